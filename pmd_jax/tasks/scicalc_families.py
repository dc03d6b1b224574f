"""The families of scicalc: one small function per kind of question.

A family draws numbers and entities from its pool and returns the question, the right value, and
values that named mistakes would give: a forgotten square, an inverted ratio, a wrong unit. A pool
serves one split only, so train, validation and test never share a number or an entity.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from pmd_jax.tasks.generated import Pool


@dataclasses.dataclass(frozen=True)
class Draw:
    """A question with its numbers. mistakes: name of the mistake -> the value that it gives."""

    stem: str
    value: float
    unit: str
    mistakes: Mapping[str, float]


ATOMIC_MASS = {
    "H": 1.008, "C": 12.01, "N": 14.01, "O": 16.00, "F": 19.00, "Na": 22.99, "Mg": 24.31,
    "Al": 26.98, "P": 30.97, "S": 32.06, "Cl": 35.45, "K": 39.10, "Ca": 40.08, "Fe": 55.85,
    "Cu": 63.55, "Zn": 65.38, "Br": 79.90, "Ag": 107.87,
}  # fmt: skip
COMPOUNDS: tuple[tuple[str, dict[str, int]], ...] = (
    ("CaCO3", {"Ca": 1, "C": 1, "O": 3}),
    ("H2SO4", {"H": 2, "S": 1, "O": 4}),
    ("C6H12O6", {"C": 6, "H": 12, "O": 6}),
    ("Fe2O3", {"Fe": 2, "O": 3}),
    ("K2CO3", {"K": 2, "C": 1, "O": 3}),
    ("Na2SO4", {"Na": 2, "S": 1, "O": 4}),
    ("MgCl2", {"Mg": 1, "Cl": 2}),
    ("C2H6O", {"C": 2, "H": 6, "O": 1}),
    ("Al2O3", {"Al": 2, "O": 3}),
    ("CuSO4", {"Cu": 1, "S": 1, "O": 4}),
    ("ZnBr2", {"Zn": 1, "Br": 2}),
    ("C3H8", {"C": 3, "H": 8}),
    ("NH4NO3", {"N": 2, "H": 4, "O": 3}),
    ("Ca3P2O8", {"Ca": 3, "P": 2, "O": 8}),
    ("AgNO3", {"Ag": 1, "N": 1, "O": 3}),
)
SOLUTES = ("NaCl", "glucose", "KBr", "urea", "HCl", "CuSO4", "NaOH", "KNO3", "sucrose", "MgSO4")
OBJECTS = ("cart", "ball", "car", "skater", "sled", "cyclist", "stone", "drone", "puck", "truck")
METALS = (
    # name, molar mass g/mol, atoms per cubic cell
    ("copper", 63.55, 4), ("iron", 55.85, 2), ("silver", 107.87, 4), ("tungsten", 183.84, 2),
    ("gold", 196.97, 4), ("aluminium", 26.98, 4), ("chromium", 52.00, 2), ("nickel", 58.69, 4),
    ("lead", 207.2, 4), ("molybdenum", 95.95, 2),
)  # fmt: skip
BEAMS = ("steel", "brass", "maple", "glass", "nylon", "bone", "copper", "titanium", "pine", "resin")
SPECIES = (
    "E. coli", "yeast", "algae", "rotifers", "B. subtilis", "plankton", "S. aureus", "mites",
    "paramecia", "fruit flies",
)  # fmt: skip
ENZYMES = (
    "lactase", "catalase", "amylase", "lipase", "urease", "trypsin", "kinase", "protease",
    "pepsin", "sucrase",
)  # fmt: skip


def formula_mass(counts: Mapping[str, int]) -> float:
    return sum(ATOMIC_MASS[atom] * n for atom, n in counts.items())


def molar_mass(pool: Pool) -> Draw:
    name, counts = pool.entity(COMPOUNDS)
    moles = pool.number(0.2, 5.0, 0.1)
    mass = formula_mass(counts)
    one_each = sum(ATOMIC_MASS[atom] for atom in counts)
    return Draw(
        f"What is the mass of {moles:g} mol of {name}?",
        moles * mass,
        "g",
        {
            "subscripts_ignored": moles * one_each,
            "divided_by_moles": mass / moles,
            "moles_forgotten": mass,
            "last_element_forgotten": moles
            * (mass - ATOMIC_MASS[list(counts)[-1]] * counts[list(counts)[-1]]),
        },
    )


def moles_from_mass(pool: Pool) -> Draw:
    name, counts = pool.entity(COMPOUNDS)
    grams = pool.number(5, 400, 1)
    mass = formula_mass(counts)
    return Draw(
        f"How many moles are in {grams:g} g of {name}?",
        grams / mass,
        "mol",
        {
            "inverted_ratio": mass / grams,
            "subscripts_ignored": grams / sum(ATOMIC_MASS[atom] for atom in counts),
            "factor_ten": 10 * grams / mass,
            "multiplied": grams * mass,
        },
    )


def dilution(pool: Pool) -> Draw:
    solute = pool.entity(SOLUTES)
    c, v = pool.number(0.5, 12, 0.1), pool.number(5, 80, 1)
    total = pool.number(100, 900, 10)
    return Draw(
        f"{v:g} mL of {c:g} M {solute} is diluted to {total:g} mL. What is the new concentration?",
        c * v / total,
        "M",
        {
            "inverted_ratio": c * total / v,
            "volumes_added": c * v / (total + v),
            "stock_only": c,
            "stock_forgotten": v / total,
        },
    )


def strong_acid_ph(pool: Pool) -> Draw:
    acid = pool.entity(("HCl", "HNO3", "HBr", "HClO4", "HI"))
    c = pool.number(0.001, 0.2, 0.001)
    return Draw(
        f"What is the pH of {c:g} M {acid}, a strong monoprotic acid?",
        -math.log10(c),
        "",
        {
            "natural_logarithm": -math.log(c),
            "poh_instead": 14 + math.log10(c),
            "concentration_doubled": -math.log10(2 * c),
            "half_ionised": -math.log10(c) / 2,
        },
    )


def ideal_gas(pool: Pool) -> Draw:
    gas = pool.entity(("helium", "nitrogen", "argon", "oxygen", "neon", "CO2", "methane"))
    n, t, p = pool.number(0.2, 6, 0.1), pool.number(5, 95, 1), pool.number(0.5, 4, 0.1)
    r = 0.08206
    return Draw(
        f"What volume do {n:g} mol of {gas} fill at {t:g} °C and {p:g} atm? "
        f"(R = 0.08206 L atm/mol K)",
        n * r * (t + 273.15) / p,
        "L",
        {
            "celsius_not_kelvin": n * r * t / p,
            "pressure_multiplied": n * r * (t + 273.15) * p,
            "moles_forgotten": r * (t + 273.15) / p,
            "molar_volume_at_0C": n * 22.4,
        },
    )


def percent_by_mass(pool: Pool) -> Draw:
    name, counts = pool.entity(COMPOUNDS)
    atom = next(iter(counts))
    grams = pool.number(10, 300, 1)
    mass, part = formula_mass(counts), ATOMIC_MASS[atom] * counts[atom]
    return Draw(
        f"How many grams of {atom} are in {grams:g} g of {name}?",
        grams * part / mass,
        "g",
        {
            "atom_fraction": grams * counts[atom] / sum(counts.values()),
            "rest_instead": grams * (mass - part) / mass,
            "inverted_ratio": grams * mass / part,
            "subscript_doubled": grams * 2 * part / (mass + part),
        },
    )


def kinetic_energy(pool: Pool) -> Draw:
    thing = pool.entity(OBJECTS)
    m, v = pool.number(2, 90, 1), pool.number(2, 30, 0.5)
    return Draw(
        f"What is the kinetic energy of a {m:g} kg {thing} moving at {v:g} m/s?",
        m * v**2 / 2,
        "J",
        {
            "forgotten_half": m * v**2,
            "forgotten_square": m * v / 2,
            "momentum_instead": m * v,
            "mass_squared": m**2 * v / 2,
        },
    )


def free_fall(pool: Pool) -> Draw:
    thing = pool.entity(OBJECTS)
    t = pool.number(0.5, 9, 0.1)
    g = 9.81
    return Draw(
        f"A {thing} falls from rest for {t:g} s. How far does it fall? (g = 9.81 m/s2)",
        g * t**2 / 2,
        "m",
        {
            "forgotten_half": g * t**2,
            "speed_instead": g * t,
            "forgotten_square": g * t / 2,
            "time_doubled": g * (2 * t) ** 2 / 2,
        },
    )


def electric_power(pool: Pool) -> Draw:
    device = pool.entity(("heater", "lamp", "motor", "kettle", "toaster", "fan", "drill"))
    v, r = pool.number(6, 240, 2), pool.number(4, 160, 1)
    return Draw(
        f"A {device} of {r:g} ohm runs at {v:g} V. What power does it draw?",
        v**2 / r,
        "W",
        {
            "current_instead": v / r,
            "multiplied": v * r,
            "inverted_ratio": r**2 / v,
            "forgotten_half": v**2 / (2 * r),
        },
    )


def wavelength(pool: Pool) -> Draw:
    source = pool.entity(("siren", "flute", "speaker", "string", "bell", "whistle", "drum"))
    f, v = pool.number(40, 950, 5), pool.number(320, 360, 1)
    return Draw(
        f"A {source} sounds at {f:g} Hz in air where sound moves at {v:g} m/s. "
        f"What is the wavelength?",
        v / f,
        "m",
        {
            "inverted_ratio": f / v,
            "half_wavelength": v / (2 * f),
            "double_wavelength": 2 * v / f,
            "factor_ten": 10 * v / f,
        },
    )


def centripetal(pool: Pool) -> Draw:
    thing = pool.entity(OBJECTS)
    v, r = pool.number(2, 40, 0.5), pool.number(3, 90, 1)
    return Draw(
        f"A {thing} rounds a curve of radius {r:g} m at {v:g} m/s. "
        f"What is its centripetal acceleration?",
        v**2 / r,
        "m/s2",
        {
            "forgotten_square": v / r,
            "multiplied": v**2 * r,
            "radius_squared": v / r**2,
            "diameter_for_radius": v**2 / (2 * r),
        },
    )


def calorimetry(pool: Pool) -> Draw:
    liquid, heat = pool.entity(
        (("water", 4.18), ("ethanol", 2.44), ("oil", 1.97), ("mercury", 0.14), ("milk", 3.93))
    )
    m, rise = pool.number(20, 900, 10), pool.number(3, 60, 1)
    return Draw(
        f"How much heat warms {m:g} g of {liquid} by {rise:g} K? (c = {heat:g} J/g K)",
        m * heat * rise,
        "J",
        {
            "capacity_forgotten": m * rise,
            "divided_by_capacity": m * rise / heat,
            "kelvin_offset_added": m * heat * (rise + 273.15),
            "factor_ten": m * heat * rise / 10,
        },
    )


def half_life(pool: Pool) -> Draw:
    sample = pool.entity(("iodine", "cobalt", "radon", "sodium", "carbon", "cesium", "radium"))
    start, half = pool.number(20, 900, 10), pool.number(2, 60, 1)
    count = pool.rng.choice((2, 3, 4, 5))
    return Draw(
        f"A {start:g} mg {sample} sample has a half-life of {half:g} days. "
        f"How much is left after {count * half:g} days?",
        start / 2**count,
        "mg",
        {
            "linear_decay": start / (2 * count),
            "one_half_life_short": start / 2 ** (count - 1),
            "decayed_part": start - start / 2**count,
            "one_half_life_more": start / 2 ** (count + 1),
        },
    )


def hardy_weinberg(pool: Pool) -> Draw:
    trait = pool.entity(("albinism", "taster", "wing", "coat", "leaf", "eye", "shell", "beak"))
    q, size = pool.number(0.05, 0.6, 0.01), pool.number(200, 5000, 100)
    p = 1 - q
    return Draw(
        f"The recessive {trait} allele has frequency {q:g} in a population of {size:g} at "
        f"Hardy-Weinberg equilibrium. How many individuals are heterozygous?",
        2 * p * q * size,
        "",
        {
            "forgotten_two": p * q * size,
            "homozygous_recessive": q**2 * size,
            "homozygous_dominant": p**2 * size,
            "allele_count": q * size,
        },
    )


def michaelis_menten(pool: Pool) -> Draw:
    enzyme = pool.entity(ENZYMES)
    vmax, km = pool.number(10, 300, 2), pool.number(0.5, 20, 0.5)
    s = pool.number(1, 60, 1)
    return Draw(
        f"{enzyme.capitalize()} has Vmax = {vmax:g} uM/s and Km = {km:g} mM. "
        f"What is its rate at {s:g} mM substrate?",
        vmax * s / (km + s),
        "uM/s",
        {
            "km_for_substrate": vmax * km / (km + s),
            "linear_in_substrate": vmax * s / km,
            "half_of_vmax": vmax / 2,
            "difference_for_sum": vmax * s / abs(km - s) if km != s else vmax,
        },
    )


def population_doubling(pool: Pool) -> Draw:
    species = pool.entity(SPECIES)
    start, doubling = pool.number(50, 900, 10), pool.number(10, 90, 5)
    count = pool.rng.choice((3, 4, 5, 6))
    return Draw(
        f"A culture of {start:g} {species} doubles every {doubling:g} min. "
        f"How many are there after {count * doubling:g} min?",
        start * 2**count,
        "",
        {
            "linear_growth": start * 2 * count,
            "one_doubling_short": start * 2 ** (count - 1),
            "squared_count": start * count**2,
            "one_doubling_more": start * 2 ** (count + 1),
        },
    )


def plate_count(pool: Pool) -> Draw:
    species = pool.entity(SPECIES)
    colonies, volume = pool.number(20, 290, 1), pool.rng.choice((0.1, 0.2, 0.5))
    power = pool.rng.choice((2, 3, 4, 5))
    return Draw(
        f"{volume:g} mL of a 10^-{power} dilution of {species} gives {colonies:g} colonies. "
        f"How many CFU per mL are in the original?",
        colonies / volume * 10**power,
        "CFU/mL",
        {
            "volume_forgotten": colonies * 10**power,
            "multiplied_by_volume": colonies * volume * 10**power,
            "one_dilution_short": colonies / volume * 10 ** (power - 1),
            "one_dilution_more": colonies / volume * 10 ** (power + 1),
        },
    )


def dihybrid_cross(pool: Pool) -> Draw:
    plant = pool.entity(("pea", "bean", "corn", "tomato", "clover", "wheat", "barley"))
    total = pool.number(160, 4800, 16)
    return Draw(
        f"Two {plant} plants, both AaBb, give {total:g} offspring. How many are expected to show "
        f"the dominant A and the recessive b trait?",
        total * 3 / 16,
        "",
        {
            "both_dominant": total * 9 / 16,
            "both_recessive": total / 16,
            "monohybrid_ratio": total * 3 / 4,
            "one_quarter": total / 4,
        },
    )


def bragg_spacing(pool: Pool) -> Draw:
    metal = pool.entity(METALS)[0]
    wave, angle = pool.number(0.07, 0.23, 0.001), pool.number(10, 40, 0.5)
    sine = math.sin(math.radians(angle))
    return Draw(
        f"X-rays of {wave:g} nm reflect from {metal} at a Bragg angle of {angle:g}° in first "
        f"order. What is the plane spacing?",
        wave / (2 * sine),
        "nm",
        {
            "forgotten_two": wave / sine,
            "cosine_for_sine": wave / (2 * math.cos(math.radians(angle))),
            "angle_doubled": wave / (2 * math.sin(math.radians(2 * angle))),
            "multiplied_by_sine": 2 * wave * sine,
        },
    )


def cubic_density(pool: Pool) -> Draw:
    metal, mass, atoms = pool.entity(METALS)
    edge = pool.number(0.25, 0.5, 0.002)
    volume = (edge * 1e-7) ** 3 * 6.022e23
    return Draw(
        f"Crystals of {metal}, {mass:g} g/mol, have {atoms} atoms in a cubic cell of {edge:g} nm. "
        f"What is its density?",
        atoms * mass / volume,
        "g/cm3",
        {
            "one_atom_per_cell": mass / volume,
            "half_the_atoms": atoms * mass / (2 * volume),
            "double_the_atoms": 2 * atoms * mass / volume,
            "square_for_cube": atoms * mass / volume * edge,
        },
    )


def tensile_strain(pool: Pool) -> Draw:
    beam = pool.entity(BEAMS)
    force, area = pool.number(1, 90, 1), pool.number(20, 400, 5)
    modulus = pool.number(5, 210, 1)
    return Draw(
        f"A {beam} rod of {area:g} mm2 and modulus {modulus:g} GPa carries {force:g} kN. "
        f"What is its strain in percent?",
        force * 1e3 / area / (modulus * 1e3) * 100,
        "%",
        {
            "stress_instead": force * 1e3 / area,
            "fraction_not_percent": force * 1e3 / area / (modulus * 1e3),
            "diameter_for_radius": force * 1e3 / (4 * area) / (modulus * 1e3) * 100,
            "factor_ten": force * 1e4 / area / (modulus * 1e3) * 100,
        },
    )


def thermal_expansion(pool: Pool) -> Draw:
    beam = pool.entity(BEAMS)
    length, rise = pool.number(0.5, 30, 0.5), pool.number(10, 180, 5)
    alpha = pool.number(3, 30, 0.5)
    return Draw(
        f"A {length:g} m {beam} bar with expansion coefficient {alpha:g}e-6 /K warms by "
        f"{rise:g} K. By how many mm does it grow?",
        length * 1e3 * alpha * 1e-6 * rise,
        "mm",
        {
            "volume_coefficient": 3 * length * 1e3 * alpha * 1e-6 * rise,
            "area_coefficient": 2 * length * 1e3 * alpha * 1e-6 * rise,
            "metres_not_mm": length * alpha * 1e-6 * rise,
            "kelvin_offset_added": length * 1e3 * alpha * 1e-6 * (rise + 273.15),
        },
    )


def heat_conduction(pool: Pool) -> Draw:
    wall = pool.entity(("brick", "glass", "wood", "concrete", "foam", "cork", "steel", "plaster"))
    k, area = pool.number(0.1, 2, 0.05), pool.number(2, 40, 1)
    gap, thick = pool.number(5, 40, 1), pool.number(2, 40, 1)
    flow = k * area * gap / (thick / 100)
    return Draw(
        f"A {wall} wall of {area:g} m2 is {thick:g} cm thick, with k = {k:g} W/m K and {gap:g} K "
        f"across it. What is the heat flow?",
        flow,
        "W",
        {
            "cm_not_metres": flow / 100,
            "thickness_multiplied": k * area * gap * thick / 100,
            "area_forgotten": flow / area,
            "forgotten_conductivity": flow / k,
        },
    )


Family = Callable[[Pool], Draw]
FAMILIES: dict[str, tuple[tuple[str, Family], ...]] = {
    "chemistry": (
        ("molar_mass", molar_mass),
        ("moles_from_mass", moles_from_mass),
        ("dilution", dilution),
        ("strong_acid_ph", strong_acid_ph),
        ("ideal_gas", ideal_gas),
        ("percent_by_mass", percent_by_mass),
    ),
    "physics": (
        ("kinetic_energy", kinetic_energy),
        ("free_fall", free_fall),
        ("electric_power", electric_power),
        ("wavelength", wavelength),
        ("centripetal", centripetal),
        ("calorimetry", calorimetry),
        ("half_life", half_life),
    ),
    "biology": (
        ("hardy_weinberg", hardy_weinberg),
        ("michaelis_menten", michaelis_menten),
        ("population_doubling", population_doubling),
        ("plate_count", plate_count),
        ("dihybrid_cross", dihybrid_cross),
    ),
    "material": (
        ("bragg_spacing", bragg_spacing),
        ("cubic_density", cubic_density),
        ("tensile_strain", tensile_strain),
        ("thermal_expansion", thermal_expansion),
        ("heat_conduction", heat_conduction),
    ),
}
