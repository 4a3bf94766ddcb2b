# Every target sets up what it needs: a virtual environment in .venv, the installation, then the job.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: demo app test test-slow test-browser screenshots lint clean

demo: .venv/installed
	$(BIN)/python -m data.build --config configs/build_demo.yaml
	rm -rf runs/demo outputs/demo
	$(BIN)/python train.py --config configs/demo.yaml
	$(BIN)/python evaluate.py --config configs/eval_demo.yaml
	$(BIN)/python -m solver.export runs/demo/best outputs/demo/solver --to solver --model zoo/mini-sd \
		--metrics runs/eval_demo/metrics.json
	@cp runs/eval_demo/table.md runs/eval_demo/contact_sheet.png outputs/demo
	@cat outputs/demo/table.md
	@echo "Look at outputs/demo/contact_sheet.png; the solver is in outputs/demo/solver."

# The light table, with the solver of `make demo` if there is one.
app: .venv/installed-demo
	$(BIN)/python app.py --model zoo/mini-sd --reward depth=zoo/depth clip=zoo/clip dino=zoo/dino \
		$(addprefix --solver ,$(wildcard runs/demo/best))

test: .venv/installed-dev lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# In Debian's Chromium if it is installed (apt-get install chromium), else in playwright's own.
test-browser: .venv/installed-dev
	$(BIN)/python -m pip install --quiet playwright
	command -v chromium > /dev/null || $(BIN)/python -m playwright install chromium
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser tests/browser

# Pictures of every page, for docs; SOLVER=folder adds the learned solver.
screenshots: .venv/installed-dev
	$(BIN)/python -m pip install --quiet playwright
	HF_HUB_OFFLINE=1 SCREENSHOTS=docs/light_table $(BIN)/python -m pytest -m browser tests/browser/test_light_table.py tests/browser/test_half_size.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

.venv/installed-demo: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

clean:
	rm -rf .venv runs outputs datasets
