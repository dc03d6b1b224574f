class Solution:
    def countSubstrings(self, s: str) -> int:
        # counts[m][r]: how many substrings that end here leave r modulo m
        counts = [[0] * m for m in range(10)]
        answer = 0
        for c in s:
            x = int(c)
            for m in range(1, 10):
                new = [0] * m
                for r, count in enumerate(counts[m]):
                    new[(10 * r + x) % m] += count
                new[x % m] += 1
                counts[m] = new
            if x > 0:
                answer += counts[x][0]
        return answer
