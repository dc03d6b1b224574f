class Solution:
    def maxSum(self, grid: list[list[int]], limits: list[int], k: int) -> int:
        pool = []
        for i, row in enumerate(grid):
            pool.extend(sorted(row, reverse=True)[: limits[i]])
        pool.sort(reverse=True)
        return sum(pool[:k])
