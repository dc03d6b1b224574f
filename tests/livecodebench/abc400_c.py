from math import isqrt

# With b odd the form is unique, so count the odd b for each a.
n = int(input())
answer = 0
for a in range(1, 61):
    answer += (isqrt(n >> a) + 1) // 2
print(answer)
