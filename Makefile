# make demo   a language model from nothing: installs, builds data, trains, prints a sample
# make test   installs, runs the whole test suite; no GPU needed
# make lint   ruff, as CI runs it
# PYTHON=python3.12 chooses the interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
# --quiet: without it the launcher logs how it starts processes.
TRAIN := $(BIN)/deepspeed --quiet

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: artifacts/demo/data-train.idx
	$(TRAIN) megalite/pretrain.py --config configs/small.yaml
	$(BIN)/python tools/generate.py --checkpoint artifacts/checkpoints/small --prompt "def " --max-new-tokens 120 --temperature 0.8 --top-p 0.95 --seed 2

artifacts/demo/corpus.jsonl: | .venv/demo
	$(BIN)/python tools/make_demo_corpus.py --output-dir artifacts/demo

artifacts/demo/tokenizer/tokenizer.json: artifacts/demo/corpus.jsonl
	$(BIN)/python tools/train_tokenizer.py --data-files artifacts/demo/corpus.jsonl --vocab-size 4096 --output-dir artifacts/demo/tokenizer

artifacts/demo/data-train.idx: artifacts/demo/tokenizer/tokenizer.json
	$(BIN)/python tools/preprocess_data.py --input artifacts/demo/corpus.jsonl --tokenizer-dir artifacts/demo/tokenizer --output-prefix artifacts/demo/data --split 98,2

test: .venv/test
	@# A file's tests stay together: they share what is slow to set up.
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/pip: constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; give another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/demo: .venv/pip
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/test: .venv/pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	@touch $@ .venv/demo
