# Every target in one line; `make setup` needs nothing but Python 3.11 to 3.13 and pip.
PYTHON ?= python3
BIN := .venv/bin
RECIPE ?= rtx3090
TINY := examples/tiny
FULL ?= out/full
TINY_BASE := --base $(TINY)/base --sam2 $(TINY)/sam2_tiny.pt

.PHONY: setup browser demo export which synth-8b export-8b build-8b bench test test-all fuzz lint

setup: .venv/ready

# torch first: sam2 needs it to build. sam2 without its dependencies: it lists torchvision, which its modelling code does not use
# and which, where it does not match torch, breaks transformers (docs/dependencies.md).
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0 'setuptools>=70' wheel
	$(BIN)/pip install -q -e '.[cpu,export,dicom,ray,dev]'
	SAM2_BUILD_CUDA=0 $(BIN)/pip install -q --no-deps --no-build-isolation sam2==1.1.0
	touch $@

# For the tests that use report.html as a person would; without it they are skipped. Debian's Chromium: root installs it.
browser:
	command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q chromium; }
	npm install --silent --no-fund --no-audit --prefix .venv/browser 'playwright-core@^1.50'

demo: setup
	$(BIN)/vessel-export export --ckpt $(TINY)/iter_*.pth $(TINY_BASE) --recipe cpu --out engines/tiny-fp32 --overwrite
	$(BIN)/vessel-rt infer $(TINY)/frames --bundle engines/tiny-fp32 -o out/demo --overwrite
	$(BIN)/vessel-rt evaluate out/demo --gt $(TINY)/annotations.json

export: $(if $(CKPT),setup,which)
	$(BIN)/vessel-export export --ckpt '$(CKPT)' --recipe $(RECIPE) $(if $(BASE),--base '$(BASE)') $(if $(SAM2),--sam2 '$(SAM2)') $(if $(OUT),--out '$(OUT)') $(ARGS)

which:
	@echo 'say which checkpoint: make export CKPT=work_dirs/iter_12192.pth' >&2; exit 2

# The real size with random weights: 19 GB of inputs, a bundle of 16 GB, engines of 15 GB, all under FULL.
synth-8b: $(FULL)/model

$(FULL)/model: | setup
	$(BIN)/python -m benchmarks.synth --out $@

export-8b: synth-8b
	$(BIN)/python -m benchmarks.export --model $(FULL)/model --out $(FULL)/bundle $(ARGS)

build-8b: setup
	$(BIN)/python -m benchmarks.build --bundle $(FULL)/bundle --describe sm86 $(ARGS)

# On a machine that does nothing else; the tables of docs/performance.md follow.
bench: | setup engines/tiny-fp32 engines/tiny-fp16
	$(BIN)/python -m benchmarks.latency $(ARGS)
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.resume
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

# Damaged input of every kind, at random; cases that end in anything but a result or one line of error are kept under out/fuzz.
MINUTES ?= 5
fuzz: setup
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
