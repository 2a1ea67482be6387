"""The same arithmetic, faster: C code for a CPU, compiled at first use and never needed for a result.

May import: the ground.
"""
