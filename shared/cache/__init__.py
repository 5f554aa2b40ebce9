"""How do parts, layers and jobs make a cache?

`cache` opens one; `writing` changes it, `reading` says what it holds, `sync` keeps it the same in two places.
"""
