"""There and back between Hugging Face folders and checkpoints, by the command line."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_trainer import config_for
from toys import GEMMA, OLMO, TEXT_CONFIG, eight_devices, toy_params, write_model_folder

from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.policy.policy import load_policy
from pmd_jax.run import train
from tools.convert_hf import largest_difference, main, rounding


@pytest.fixture
def folder(tmp_path):
    return write_model_folder(tmp_path / "toy")


def test_import_and_export_are_bit_equal(folder, tmp_path, capsys):
    assert main(["import", str(folder), str(tmp_path / "imported")]) == 0
    assert "float32, 27,040 parameters; use it as config.model.path" in capsys.readouterr().out
    out = tmp_path / "exported"
    assert main(["export", str(tmp_path / "imported"), str(out), "--dtype", "float32"]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    names = {f.name for f in folder.iterdir()}
    assert {f.name for f in out.iterdir()} == names


def test_an_imported_model_is_a_model_path_on_any_mesh(folder, tmp_path):
    main(["import", str(folder), str(tmp_path / "imported")])
    for path in (tmp_path / "imported", tmp_path / "imported" / "checkpoints" / "0"):
        policy = load_policy(path, "float32", mesh=eight_devices())
        jax.tree.map(np.testing.assert_array_equal, policy.params, toy_params(0, TEXT_CONFIG))
        assert policy.tokenizer.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.slow
def test_a_run_is_exported_and_so_are_one_step_of_it_and_its_teacher(folder, tmp_path, capsys):
    config = config_for(folder, tmp_path / "runs", steps=2)
    config = dataclasses.replace(config, distill=DistillConfig(teacher="ema", bucket_tokens=512))
    run = train(config).folder
    step = run / "checkpoints" / "1"
    for source, out, flags in (
        (run, "last", []),
        (step, "first", []),
        (run, "teacher", ["--teacher"]),
    ):
        assert main(["export", str(source), str(tmp_path / out), "--dtype=float32", *flags]) == 0
    embeds = {
        name: load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        for name in ("last", "first", "teacher")
    }
    start = np.asarray(toy_params(0, TEXT_CONFIG)["embed"])
    moved = {name: np.abs(embed - start).max() for name, embed in embeds.items()}
    assert 0 < moved["teacher"] < moved["first"] < moved["last"]
    np.testing.assert_array_equal(load_policy(run, "float32").params["embed"], embeds["last"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{toy}", "{out}"], "must be a run's folder"),
        (["export", "{imported}", "{toy}"], "must be empty or new"),
        (["export", "{imported}", "{out}", "--teacher"], "holds no teacher"),
        (["import", "{imported}", "{out}"], "is a checkpoint already"),
        (["import", "{toy}", "{toy}"], "must be empty or new"),
        (["import", "./none", "{out}"], "a model folder must hold config.json"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    folder, tmp_path, capsys, arguments, message
):
    main(["import", str(folder), str(tmp_path / "imported")])
    capsys.readouterr()
    places = {"toy": folder, "imported": tmp_path / "imported", "out": tmp_path / "out"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert {f.name for f in tmp_path.iterdir()} == {"toy", "imported"}


def test_a_run_that_lost_its_model_files_or_was_never_saved_is_named(folder, tmp_path, capsys):
    main(["import", str(folder), str(tmp_path / "imported")])
    (tmp_path / "imported" / "model" / "config.json").unlink()
    assert main(["export", str(tmp_path / "imported"), str(tmp_path / "out")]) == 2
    assert "lacks model/config.json" in capsys.readouterr().err
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert main(["export", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["_METADATA", "manifest.ocdbt", "d"])
def test_a_damaged_checkpoint_is_one_line(folder, tmp_path, damage):
    main(["import", str(folder), str(tmp_path / "imported")])
    state = tmp_path / "imported" / "checkpoints" / "0" / "state"
    if damage == "d":
        for file in (state / "d").iterdir():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        (state / damage).unlink()
    with pytest.raises(ValueError, match=r"state: damaged .*restore it from a copy"):
        load_policy(tmp_path / "imported")


def test_what_only_looks_like_a_step_is_passed_over(folder, tmp_path):
    main(["import", str(folder), str(tmp_path / "imported")])
    for name in ("7.orbax-checkpoint-tmp", "10.bak"):
        (tmp_path / "imported" / "checkpoints" / name / "state").mkdir(parents=True)
    assert load_policy(tmp_path / "imported", "float32").config == TEXT_CONFIG


def test_a_folder_of_weights_has_no_teacher(folder):
    with pytest.raises(ValueError, match="which: must be params"):
        load_policy(folder, "float32", which="teacher")


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    main(["import", str(folder), str(tmp_path / "imported")])
    file = tmp_path / "imported" / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 64}))
    with pytest.raises(ValueError, match="are not those of a model of"):
        load_policy(tmp_path / "imported")


@pytest.mark.parametrize("config", [GEMMA, OLMO], ids=lambda c: c.family)
def test_every_weight_of_every_family_has_one_name(config):
    from pmd_jax.policy.families import weight_table
    from pmd_jax.policy.weights import hf_names

    names = [name for weight in weight_table(config) for name in hf_names(weight, config)]
    assert len(names) == len(set(names))


def test_the_largest_difference_is_found():
    zeros = np.zeros((3, 5))
    off = zeros.copy()
    off[1, 4] = -0.5
    found = largest_difference(lambda p: zeros, lambda p: off if p == [7] else zeros, [[1], [7]])
    assert (found.logits, found.text, found.position, found.token) == (0.5, 1, 1, 4)
    nan = largest_difference(lambda p: zeros * np.nan, lambda p: zeros, [[1]])
    assert nan.logits == np.inf
    assert found.largest == 0.5 and rounding(5.0) == 1e-4 and rounding(30.0) == pytest.approx(3e-4)


PEAK = """
import re, sys, jax, numpy as np
from pmd_jax.policy.policy import load_policy
# Unlike getrusage's, this peak does not begin with the parent's.
kib = lambda: int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8)))
before = kib()
policy = load_policy(sys.argv[1], "float32")
held = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.params))
loaded = kib()
policy.save_hf(sys.argv[2])
print((loaded - before) * 1024 / held, (kib() - before) * 1024 / held)
"""


@pytest.mark.slow
def test_import_and_export_hold_little_more_than_the_weights(tmp_path):
    """At most 1.3 times the bytes of the parameters above what the process had: 0.9 GB here."""
    big = dataclasses.replace(  # proportions of a real model, where no parameter dominates
        TEXT_CONFIG,
        num_layers=24,
        width=768,
        mlp_width=2560,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        vocab_size=65536,
    )
    folder = write_model_folder(tmp_path / "big", big)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        env={"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(tmp_path)},
    )
    loading, saving = map(float, done.stdout.split())
    print(loading, saving)  # seen: 1.12 and 1.19
    assert 0.9 < loading <= 1.3 and loading <= saving <= 1.3
