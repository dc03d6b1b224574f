import sys
from collections import Counter

counts = sorted(Counter(input().split()).values())
if len(counts) > 1 and counts[-1] >= 3 and counts[-2] >= 2:
    print("Yes")
else:
    print("No")
sys.exit()
