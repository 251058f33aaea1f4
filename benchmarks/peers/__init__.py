"""What a person would write by hand instead: the yardsticks of the training benchmarks.

gpt.py is a plain GPT, loop.py a plain loop around it, shakespeare.py the two at work on characters. They have the shape
of nanoGPT (the same parts, settings and order of work), are written anew, and know nothing of this package.
"""
