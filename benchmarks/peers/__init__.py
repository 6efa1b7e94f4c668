"""What `benchmarks.cpu_peers` runs in the environments of the libraries that it compares with. Nothing here imports this project.

Each file is a program with one argument, a request in JSON. `make` writes a model of random weights in the library's own format; `time`
loads it, measures, and prints the result in JSON.
"""
