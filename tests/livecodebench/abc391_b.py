n, m = map(int, input().split())
s = [input() for _ in range(n)]
t = [input() for _ in range(m)]

for a in range(n - m + 1):
    for b in range(n - m + 1):
        if all(s[a + i][b : b + m] == t[i] for i in range(m)):
            print(a + 1, b + 1)
