import sys


def main():
    n, *a = map(int, sys.stdin.buffer.read().split())
    last = {}
    best = n + 1
    for i, x in enumerate(a):
        if x in last:
            best = min(best, i - last[x] + 1)
        last[x] = i
    print(best if best <= n else -1)


main()
