def main():
    input()
    p = list(map(int, input().split()))
    for x in p:
        print(1 + sum(y > x for y in p))


if __name__ == "__main__":
    main()
