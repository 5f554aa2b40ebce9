"""How does a program that a model wrote run without harm?"""
