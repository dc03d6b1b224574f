import sys

close = {"(": ")", "[": "]", "<": ">"}
due = []
for c in input():
    if c in close:
        due.append(close[c])
    elif not due or due.pop() != c:
        print("No")
        sys.exit()
print("No" if due else "Yes")
