"""What can this machine do, and which command mends what it cannot?"""
