# ruff: noqa: UP006, UP035
from collections import Counter
from typing import List


class Solution:
    def largestInteger(self, nums: List[int], k: int) -> int:
        windows = Counter()
        for i in range(len(nums) - k + 1):
            windows.update(set(nums[i : i + k]))
        return max((x for x, count in windows.items() if count == 1), default=-1)
