"""What does each model reach on published benchmarks?"""
