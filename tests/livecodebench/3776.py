# ruff: noqa: UP006, UP035
import sys
from functools import cache
from typing import List

sys.setrecursionlimit(10000)


class Solution:
    def minCost(self, nums: List[int]) -> int:
        n = len(nums)

        @cache
        def cost(left: int, i: int) -> int:
            # nums[left] remains of the items before i
            if i == n:
                return nums[left]
            if i == n - 1:
                return max(nums[left], nums[i])
            a, b, c = nums[left], nums[i], nums[i + 1]
            return min(
                max(a, b) + cost(i + 1, i + 2),
                max(a, c) + cost(i, i + 2),
                max(b, c) + cost(left, i + 2),
            )

        return cost(0, 1)
