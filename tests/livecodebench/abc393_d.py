import sys

# With k ones before it, a one at i must meet the others at i - k: gather at the median.
s = sys.stdin.read().split()[1]
places = [i for i, c in enumerate(s) if c == "1"]
shifted = [i - k for k, i in enumerate(places)]
middle = shifted[len(shifted) // 2]
print(sum(abs(x - middle) for x in shifted))
