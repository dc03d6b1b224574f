n, m = map(int, input().split())
black = sorted(map(int, input().split()), reverse=True)
white = sorted(map(int, input().split()), reverse=True)

# Take the i + 1 best black balls and as many of the best white ones, where they help.
best = total = 0
for i in range(n):
    total += black[i]
    if i < m and white[i] > 0:
        total += white[i]
    best = max(best, total)
print(best)
