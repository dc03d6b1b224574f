import sys
from collections import Counter

input = sys.stdin.readline

n = int(input())
a = list(map(int, input().split()))

left = set()
right = Counter(a)
best = 0
for x in a:
    left.add(x)
    if right[x] == 1:
        del right[x]
    else:
        right[x] -= 1
    best = max(best, len(left) + len(right))
print(best)
