from collections import defaultdict


class Solution:
    def sortMatrix(self, grid: list[list[int]]) -> list[list[int]]:
        n = len(grid)
        diagonals = defaultdict(list)
        for i in range(n):
            for j in range(n):
                diagonals[i - j].append(grid[i][j])
        for d, values in diagonals.items():
            values.sort(reverse=d < 0)  # they are popped from the end
        return [[diagonals[i - j].pop() for j in range(n)] for i in range(n)]
