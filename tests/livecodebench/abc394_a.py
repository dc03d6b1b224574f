s = input()
print("2" * s.count("2"))
