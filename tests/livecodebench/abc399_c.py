# An edge inside a tree of the union-find forest closes a cycle.
n, m, *ends = map(int, open(0).read().split())  # noqa: SIM115
parent = list(range(n + 1))


def find(v):
    while parent[v] != v:
        parent[v] = parent[parent[v]]
        v = parent[v]
    return v


extra = 0
for i in range(m):
    u, v = find(ends[2 * i]), find(ends[2 * i + 1])
    if u == v:
        extra += 1
    else:
        parent[u] = v
print(extra)
