from typing import List  # noqa: UP035


class Solution:
    def numOfUnplacedFruits(self, fruits: List[int], baskets: List[int]) -> int:  # noqa: UP006
        # A tree of maxima leads to the leftmost basket that is large enough.
        size = 1
        while size < len(baskets):
            size *= 2
        tree = [0] * (2 * size)
        tree[size : size + len(baskets)] = baskets
        for i in range(size - 1, 0, -1):
            tree[i] = max(tree[2 * i], tree[2 * i + 1])

        unplaced = 0
        for fruit in fruits:
            if tree[1] < fruit:
                unplaced += 1
                continue
            i = 1
            while i < size:
                i = 2 * i if tree[2 * i] >= fruit else 2 * i + 1
            tree[i] = 0
            while i > 1:
                i //= 2
                tree[i] = max(tree[2 * i], tree[2 * i + 1])
        return unplaced
