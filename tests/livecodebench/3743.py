# ruff: noqa: UP006, UP035
from typing import List


class Solution:
    def maxFreeTime(self, eventTime: int, k: int, startTime: List[int], endTime: List[int]) -> int:
        # Moving k meetings joins k + 1 gaps in a row.
        gaps = []
        last = 0
        for i in range(len(startTime)):
            gaps.append(startTime[i] - last)
            last = endTime[i]
        gaps.append(eventTime - last)

        best = window = sum(gaps[: k + 1])
        for i in range(k + 1, len(gaps)):
            window += gaps[i] - gaps[i - k - 1]
            best = max(best, window)
        return best
