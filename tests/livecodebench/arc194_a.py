import sys

data = list(map(int, sys.stdin.read().split()))
a = data[1:]

# The best sums after one item less and after two items less.
one, two = 0, -(10**18)
for x in a:
    one, two = max(one + x, two), one
print(one)
