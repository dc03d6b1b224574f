class Solution:
    def findValidPair(self, s: str) -> str:
        for i in range(len(s) - 1):
            a, b = s[i], s[i + 1]
            if a != b and s.count(a) == int(a) and s.count(b) == int(b):
                return a + b
        return ""
