import itertools


class Solution:
    def hasSpecialSubstring(self, s: str, k: int) -> bool:
        return any(len(list(run)) == k for _, run in itertools.groupby(s))
