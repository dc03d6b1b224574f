import sys
import threading

sys.setrecursionlimit(10**6)
threading.stack_size(1 << 26)


def main():
    n, m = map(int, sys.stdin.readline().split())
    graph = [[] for _ in range(n)]
    for _ in range(m):
        u, v, w = map(int, sys.stdin.readline().split())
        graph[u - 1].append((v - 1, w))
        graph[v - 1].append((u - 1, w))

    seen = [False] * n
    best = 1 << 60

    def walk(v, value):
        nonlocal best
        if v == n - 1:
            best = min(best, value)
            return
        seen[v] = True
        for u, w in graph[v]:
            if not seen[u]:
                walk(u, value ^ w)
        seen[v] = False

    walk(0, 0)
    print(best)


thread = threading.Thread(target=main)
thread.start()
thread.join()
