"""What recipes are worth over seeds: accuracy, attacks, leaks. The figures of docs, by command.

    python -m studies.recipes --help             # from the root of a checkout

Figures of speed, bytes and memory are those of `benchmarks/`.
"""
