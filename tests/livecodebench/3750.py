# ruff: noqa: UP006, UP035
from bisect import bisect_left
from collections import defaultdict
from typing import List


class Solution:
    def solveQueries(self, nums: List[int], queries: List[int]) -> List[int]:
        n = len(nums)
        places = defaultdict(list)
        for i, x in enumerate(nums):
            places[x].append(i)

        answer = []
        for q in queries:
            same = places[nums[q]]
            if len(same) == 1:
                answer.append(-1)
                continue
            k = bisect_left(same, q)
            before = same[k - 1]
            after = same[(k + 1) % len(same)]
            answer.append(min((q - before) % n, (after - q) % n))
        return answer
