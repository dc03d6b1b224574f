# ruff: noqa: UP006, UP035
import heapq
from typing import List


class Solution:
    def findMaxSum(self, nums1: List[int], nums2: List[int], k: int) -> List[int]:
        # In the order of nums1, keep the k largest of nums2 in a heap.
        order = sorted(range(len(nums1)), key=lambda i: nums1[i])
        answer = [0] * len(nums1)
        heap = []
        total = 0
        done = 0
        for i in order:
            while nums1[order[done]] < nums1[i]:
                value = nums2[order[done]]
                heapq.heappush(heap, value)
                total += value
                if len(heap) > k:
                    total -= heapq.heappop(heap)
                done += 1
            answer[i] = total
        return answer
