import sys
from heapq import heappop, heappush


# Dijkstra on two layers: vertex v of the reversed graph is v + n.
def main():
    n, m, x, *ends = map(int, sys.stdin.buffer.read().split())
    graph = [[] for _ in range(2 * n)]
    for i in range(m):
        u, v = ends[2 * i] - 1, ends[2 * i + 1] - 1
        graph[u].append(v)
        graph[v + n].append(u + n)

    dist = [float("inf")] * (2 * n)
    dist[0] = 0
    heap = [(0, 0)]
    while heap:
        d, v = heappop(heap)
        if d > dist[v]:
            continue
        for u in graph[v]:
            if d + 1 < dist[u]:
                dist[u] = d + 1
                heappush(heap, (d + 1, u))
        other = (v + n) % (2 * n)
        if d + x < dist[other]:
            dist[other] = d + x
            heappush(heap, (d + x, other))
    print(min(dist[n - 1], dist[2 * n - 1]))


if __name__ == "__main__":
    main()
