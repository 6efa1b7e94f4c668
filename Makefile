# docs/guide.md lists the targets. `make setup` needs only Python 3.11 to 3.13 and pip.
PYTHON ?= python3
BIN := .venv/bin
RECIPE ?= rtx3090
TINY := examples/tiny
FULL ?= out/full
TINY_BASE := --base $(TINY)/base --sam2 $(TINY)/sam2_tiny.pt

.PHONY: setup browser demo check export which synth-8b export-8b infer-8b build-8b bench test test-all fuzz lint docs

setup: .venv/ready

# torch comes first because sam2 needs it to build. sam2 is installed without its dependencies: they include torchvision, which
# sam2's modeling code does not use and which breaks transformers if it does not match torch (docs/dependencies.md).
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0 'setuptools>=70' wheel
	$(BIN)/pip install -q -e '.[cpu,export,dicom,ray,dev]'
	SAM2_BUILD_CUDA=0 $(BIN)/pip install -q --no-deps --no-build-isolation sam2==1.1.0
	touch $@

# For the tests that operate report.html in a browser; they are skipped without it. Installing Debian's Chromium needs root.
browser:
	command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q chromium; }
	npm install --silent --no-fund --no-audit --prefix .venv/browser 'playwright-core@^1.50'

demo: setup
	$(BIN)/vessel-export export --ckpt $(TINY)/iter_*.pth $(TINY_BASE) --recipe cpu --out engines/tiny-fp32 --overwrite
	$(BIN)/vessel-rt infer $(TINY)/frames --bundle engines/tiny-fp32 -o out/demo --overwrite
	$(BIN)/vessel-rt evaluate out/demo --gt $(TINY)/annotations.json

# Proves the demo's bundle on this machine. ARGS may name another one: make check ARGS='--bundle DIR --device cuda'.
check: | setup engines/tiny-fp32
	$(BIN)/vessel-rt check --bundle engines/tiny-fp32 -o out/check $(ARGS)

export: $(if $(CKPT),setup,which)
	$(BIN)/vessel-export export --ckpt '$(CKPT)' --recipe $(RECIPE) $(if $(BASE),--base '$(BASE)') $(if $(SAM2),--sam2 '$(SAM2)') $(if $(OUT),--out '$(OUT)') $(ARGS)

which:
	@echo 'no checkpoint given; use: make export CKPT=work_dirs/iter_12192.pth' >&2; exit 2

# A model of the full size with random weights, under FULL: 19 GB of inputs, a bundle of 16 GB, engines of 15 GB.
synth-8b: $(FULL)/model

$(FULL)/model: | setup
	$(BIN)/python -m benchmarks.synth --out $@

export-8b: synth-8b
	$(BIN)/python -m benchmarks.export --model $(FULL)/model --out $(FULL)/bundle $(ARGS)

# Exports with cpu-int8 and segments frames on the CPU.
infer-8b: synth-8b
	$(BIN)/python -m benchmarks.infer --model $(FULL)/model $(ARGS)

build-8b: setup
	$(BIN)/python -m benchmarks.build --bundle $(FULL)/bundle --describe sm86 $(ARGS)

# Run this on an idle machine. It also updates the tables in docs/performance.md.
bench: | setup engines/tiny-fp32 engines/tiny-fp16
	$(BIN)/python -m benchmarks.latency $(ARGS)
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.resume
	$(BIN)/python -m benchmarks.cines --rounds 3
	$(BIN)/python -m benchmarks.floor
	$(BIN)/python -m benchmarks.report

engines/tiny-%: | setup
	$(BIN)/vessel-export export --ckpt $(TINY)/iter_*.pth $(TINY_BASE) --recipe cpu --precision $* --out $@

# Both tiers: docs/contributing.md. JOBS processes share the fast one; the slow one kills processes and watches what others do, alone.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest

test: setup
	$(PYTEST) -n $(JOBS) --dist loadfile

test-all: test
	$(PYTEST) -m 'slow or full_width'

# Damages every kind of input at random. Cases that do not end in a result or a one-line error are kept under out/fuzz.
MINUTES ?= 5
fuzz: setup
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

# The pages that are made from the code.
docs: setup
	$(BIN)/python docs/make_formats.py

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
