"""Answers to "write add(a, b)": some solve nothing and want to score, some are right with unusual names."""

CHEATS = {
    "exec and check redefined": r"""
def exec(*a): pass
def check(f): pass
def add(a, b): return 0
""",
    "compile redefined": r"""
def compile(*a): return 'def check(f): pass'
def add(a, b): return 0
""",
    "globals redefined": r"""
def globals(): return {}
def check(f): pass
def add(a, b): return 0
""",
    "builtins' exec": r"""
import builtins
builtins.exec = lambda *a: None
builtins.compile = lambda *a: None
def add(a, b): return 0
""",
    "builtins' abs and AssertionError": r"""
import builtins
builtins.abs = lambda x: 0
builtins.AssertionError = KeyError
def add(a, b): return 0
""",
    "encoder of json": r"""
import json
old = json._default_encoder.encode
json._default_encoder.encode = lambda o: old({**o, 'error': ''} if isinstance(o, dict) else o)
def add(a, b): return 0
""",
    "equal to everything": r"""
class E(int):
    def __eq__(self, o): return True
    __hash__ = None
def add(a, b): return E(0)
""",
    "equal list": r"""
class L(list):
    def __eq__(self, o): return True
def add(a, b): return L()
""",
    "reflected operators": r"""
class F(float):
    def __sub__(self, o): return 0
    def __eq__(self, o): return True
    def __abs__(self): return 0
def add(a, b): return F()
""",
    "verdict through the callers' frames": r"""
import sys, os
def add(a, b):
    f = sys._getframe()
    while f:
        for v in list(f.f_locals.values()) + list(f.f_globals.values()):
            if isinstance(v, str) and len(v) == 32:
                os.write(int(sys.argv[1]), (v + '\n').encode()); os._exit(0)
        f = f.f_back
    return 0
""",
    "nonce from the collector": r"""
import gc, sys, os
for o in gc.get_objects():
    for v in (o.values() if type(o) is dict else ()):
        if isinstance(v, str) and len(v) == 32: os.write(int(sys.argv[1]), (v + '\n').encode())
def add(a, b): return 0
""",
    "not confined, it says": r"""
import gc, sys, os
for o in gc.get_objects():
    for v in (o.values() if type(o) is dict else ()):
        if isinstance(v, str) and len(v) == 32: os.write(int(sys.argv[1]), (v + '\nno walls').encode())
def add(a, b): return 0
""",
    "expected value from the caller's code": r"""
import sys
def add(a, b):
    f = sys._getframe(1)
    while f:
        if f.f_code.co_name == 'check':
            return f.f_code.co_consts[3]
        f = f.f_back
    return 0
""",
    "check replaced in every module": r"""
import sys
for m in list(sys.modules.values()):
    try: m.check = lambda f: None
    except Exception: pass
def add(a, b): return 0
""",
    "leaves with status 0": r"""
import os
def add(a, b): os._exit(0)
""",
    "leaves at once": r"""
raise SystemExit(0)
""",
    "trace function": r"""
import sys
sys.settrace(lambda *a: None)
sys.excepthook = lambda *a: None
def add(a, b): return 0
""",
    "writes to every descriptor": r"""
import os
for fd in range(3, 64):
    try: os.write(fd, b'["returned", 3]\n' * 9)
    except OSError: pass
os._exit(0)
""",
    "no data": r"""
def add(a, b): return object()
""",
    "foreign data": r"""
import os
def add(a, b):
    os.write(PIPES[1] if 'PIPES' in dir() else 5, b'{"x": [[[[')
    return 0
""",
    "nested results": r"""
import os
def add(a, b):
    for fd in range(3, 9):
        try: os.write(fd, b'[' * 50000 + b'\n')
        except OSError: pass
""",
    "assertions off": r"""
import sys
sys.flags = None
__debug__ and None
def add(a, b): return 0
""",
    "a thread of exits": r"""
import atexit, os
atexit.register(os._exit, 0)
def add(a, b): return 0
""",
    "arguments emptied": r"""
def add(a, b):
    if isinstance(a, list): a.clear()
    return a
""",
    "an endless loop": r"""
def add(a, b):
    while True: pass
""",
    "a fault of memory": r"""
import ctypes
ctypes.string_at(0)
def add(a, b): return 0
""",
}

RIGHT = {
    "a helper called compile": r"""
def compile(x):
    return x[0] + x[1]
def add(a, b):
    return compile([a, b])
""",
    "a helper called exec": r"""
def exec(op, a, b):
    return a + b
def add(a, b):
    return exec('+', a, b)
""",
    "a variable called globals": r"""
globals = {}
def add(a, b):
    return a + b
""",
    "names of the harness": r"""
serve = caller = encode = decode = execute = Broken = json = PIPES = None
def add(a, b):
    return a + b
""",
    "a main guard": r"""
def add(a, b):
    return a + b
if __name__ == '__main__':
    raise SystemExit(1)
""",
    "a data class": r"""
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class P:
    a: list[int]
def add(a, b):
    return P(a).a + b
""",
    "a subclass of list": r"""
class L(list): pass
def add(a, b):
    return L(a + b) if isinstance(a, list) else a + b
""",
    "prints": r"""
def add(a, b):
    print(a, b)
    return a + b
""",
}
