"""What will it cost, and can it work at all?"""
