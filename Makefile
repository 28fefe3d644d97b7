# The front door: every target installs what it lacks, then does its work.
#
#   make demo    build in release and ask the demo model a question
#   make install put the program `kimi-linear` on the PATH, into cargo's bin folder
#   make serve   serve the demo model to OpenAI's clients on http://127.0.0.1:8000
#   make app     build and open the desktop app
#   make web     build the app as a page for browsers and serve it on http://127.0.0.1:8080
#   make quick   format, lints, unit tests, the conformance list on the CPU: what to run before a commit
#   make test    format, lints, every test, the documentation's examples
#   make fuzz    headers of weight files, frames of transfers, HTTP bodies, schemas and templates that no program wrote, many of each kind
#   make abuse   hostile and broken clients for an hour beside ones whose answers must not change
#   make nodes   one model on two and on four processes that are killed and stopped, beside requests whose answers must not change
#   make bursts  random bursts, cancellations and lost devices beside replicas that drop and restore parameters
#   make clients the program with seven more of OpenAI's clients: litellm, langchain, pydantic-ai, instructor, llm, lm-eval, guidellm
#   make llama-cpp  llama.cpp opens what `quantize` writes of the demo model, and answers with the same tokens
#   make bench   the benchmarks behind docs/performance.md
#   make kernels compile the CUDA kernels for sm_90a (PTX and cubins, in target/cuda/kernels); needs no GPU
#   make archive lay out a release archive: program and app, kernels, manual, licences
#   make features check that the library compiles with each of its features alone
#   make cluster      build the worker and the frontend for NVIDIA Dynamo (cluster/), with some 900 dependencies of their own
#   make cluster-demo two clusters and a shaped link between them on this machine, with real workers; network namespaces need root
#   make test-cluster the tests of cluster/: processes that are killed, restarted and change their roles
#   make audit   licences, sources and duplicates of all dependencies (cargo-deny)
#   make image   a Docker image that serves a model
#   make clean   remove what was built

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# One optimised profile for tests and demo: dependencies are built once.
CARGO := cargo
PROFILE := --release

SERVE_FLAGS :=
PYTHON_PACKAGES := openai==3.52.0 anthropic==2.14.0 matplotlib==3.11.2 huggingface_hub==2.4.0 numpy==2.4.6 safetensors==0.8.0 gguf==0.19.0 jinja2==3.1.6
DEMO_PROMPT := The red box holds 7. The blue box holds 2. Now the red box holds 3. What does the red box hold?

# Mesa's software driver complains on every start where this is unset, as in containers.
export XDG_RUNTIME_DIR ?= $(CURDIR)/target

.PHONY: cluster cluster-demo test-cluster install-cluster-tools help demo install app app-pictures web serve quick test fuzz abuse nodes bursts clients llama-cpp bench kernels archive features audit image clean install-rust-components install-vulkan-driver install-cuda-compiler \
	install-window install-xvfb install-browser install-node

help:
	@sed -n 's/^#   //p' Makefile

# The toolchain of rust-toolchain.toml with its components; rustup does nothing where they are there.
install-rust-components:
	@command -v $(CARGO) >/dev/null || { echo "error: cargo is not installed; see https://rustup.rs" >&2; exit 1; }
	@command -v cc >/dev/null || .ci/install-packages gcc libc6-dev
	@$(CARGO) fmt --version >/dev/null 2>&1 && $(CARGO) clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy

# The conformance list runs on wgpu too: a machine without any Vulkan driver gets the one that runs on the CPU.
install-vulkan-driver:
	@if [ "$$(uname)" = Linux ] && ! { PATH="$$PATH:/sbin" ldconfig -p | grep 'libvulkan\.so\.1' >/dev/null \
		&& grep -qs library_path /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json; }; then \
		.ci/install-packages libvulkan1 mesa-vulkan-drivers; fi

# The CUDA kernels are compiled for a GPU that need not be there, and run on the CPU, which takes a C++ compiler.
install-cuda-compiler:
	@command -v c++ >/dev/null || .ci/install-packages g++ libc6-dev
	@.ci/install-cuda-compiler target/cuda

# What winit opens at run time to show a window under X11.
install-window: install-vulkan-driver
	@if [ "$$(uname)" = Linux ] && ! PATH="$$PATH:/sbin" ldconfig -p | grep 'libxkbcommon-x11\.so\.0' >/dev/null; then \
		.ci/install-packages libx11-6 libx11-xcb1 libxcursor1 libxi6 libxrandr2 libxkbcommon-x11-0; fi

# A display without a screen: tests open a real window on it, type and click (xdotool), and copy and paste from a second program (xclip).
install-xvfb: install-window
	@if [ "$$(uname)" = Linux ]; then for name in Xvfb xdotool xclip; do \
		command -v $$name >/dev/null || { .ci/install-packages xvfb xdotool xclip; break; }; done; fi

# The chat page of the server is tested in a browser. Where none can be had, a file says so to the test, which is skipped aloud.
install-browser:
	@mkdir -p target; rm -f target/no-browser
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
		.ci/install-packages chromium || touch target/no-browser

# The npm clients are tested with Node. Where it cannot be had, a file says so to their tests, which are skipped aloud.
install-node:
	@mkdir -p target; rm -f target/no-node
	@{ command -v node && command -v npm; } >/dev/null || .ci/install-packages nodejs npm || touch target/no-node

demo: install-rust-components
	$(CARGO) build $(PROFILE) --locked
	@echo; echo '> $(DEMO_PROMPT)'
	@$(CARGO) run $(PROFILE) --locked --quiet -- run '$(DEMO_PROMPT)'
	@echo '`make install` puts kimi-linear on your PATH. Then try `kimi-linear chat`: who is where and has what, "Reverse: key, lamp, pear.", "Push apple. Push pear. Pop. What is on top?"'

install: install-rust-components
	$(CARGO) build $(PROFILE) --locked
	@bin="$${CARGO_HOME:-$$HOME/.cargo}/bin"; mkdir -p "$$bin"; strip -o "$$bin/kimi-linear" target/release/kimi-linear; \
		echo "installed $$bin/kimi-linear"; command -v kimi-linear >/dev/null || echo "add $$bin to your PATH"

serve: install-rust-components
	$(CARGO) build $(PROFILE) --locked
	$(CARGO) run $(PROFILE) --locked --quiet -- serve $(SERVE_FLAGS)

# The server's tests speak to it with the published clients (openai, anthropic), those of snapshots plot one, those of GGUF files write them, in a
# Python of its own.
target/python/made: Makefile
	@python3 -c 'import ensurepip, venv' 2>/dev/null || .ci/install-packages python3 python3-venv
	@rm -rf target/python
	@python3 -m venv target/python
	@target/python/bin/python -m pip install --quiet --disable-pip-version-check $(PYTHON_PACKAGES)
	@touch $@

# The npm clients, in the versions of the lock file. No script of a package runs.
target/npm/made: tests/clients/npm/package.json tests/clients/npm/package-lock.json | install-node
	@rm -rf target/npm; mkdir -p target/npm; cp tests/clients/npm/package*.json target/npm
	@[ -e target/no-node ] || npm ci --prefix target/npm --silent --no-audit --no-fund --ignore-scripts
	@[ -e target/no-node ] || touch $@

app: install-rust-components install-window
	$(CARGO) run $(PROFILE) --locked --package kimi-linear-app

WEB_PORT := 8080

web: install-rust-components
	@command -v python3 >/dev/null || .ci/install-packages python3
	.ci/build-web
	@[ -e target/no-web ] || { echo "http://127.0.0.1:$(WEB_PORT)/"; python3 -m http.server --bind 127.0.0.1 --directory target/web $(WEB_PORT); }

# The pictures of README and docs/app.md: the script types, looks and saves; pngquant and gifsicle make them small where they are there.
app-pictures: install-rust-components install-xvfb target/python/made
	$(CARGO) build $(PROFILE) --locked --package kimi-linear-app
	.ci/on-xvfb target/release/kimi-linear-app --demo --backend cpu --demo-script docs/app/pictures.script --out docs/app
	.ci/on-xvfb target/release/kimi-linear-app --demo --backend cpu --demo-script docs/app/moving.script --out target/frames
	target/python/bin/python docs/app/moving.py target/frames docs/app/memory.gif
	@if command -v gifsicle >/dev/null; then gifsicle --batch --optimize=3 --lossy=60 --colors 64 docs/app/memory.gif; fi
	@if command -v pngquant >/dev/null; then for picture in docs/app/*.png; do \
		pngquant --quality 85-100 --strip --force --output $$picture $$picture || true; done; fi

# Our own crates with little optimisation and incrementally; dependencies are those of `make test`.
QUICK := $(PROFILE) --locked --workspace --config profile.release.incremental=true \
	$(foreach crate,kimi-linear kimi-linear-app kimi-linear-hub kimi-linear-plan,--config profile.release.package.$(crate).opt-level=1)

quick: install-rust-components
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(QUICK) --all-targets -- -D warnings
	$(CARGO) test $(QUICK) --lib --bins
	$(CARGO) test $(QUICK) --test conformance -- cpu/

# Many tests wait for sockets, timers or a browser's GPU: more of them at a time than there are cores.
TEST_THREADS := $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 2)))

# This test takes minutes of a browser that compiles shaders, on little more than one core: it runs beside all others.
IN_TAB := the_conformance_list_passes_in_the_tab

test: install-rust-components install-xvfb install-browser install-cuda-compiler target/python/made target/npm/made
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(PROFILE) --locked --workspace --all-targets -- -D warnings
	.ci/build-web
	$(CARGO) test $(PROFILE) --locked --workspace --no-run
	@$(CARGO) test $(PROFILE) --locked --workspace --test web -- --exact $(IN_TAB) >target/in-tab.log 2>&1 & in_tab=$$!; \
	trap 'kill $$in_tab; exit 130' INT TERM; \
	RUST_TEST_THREADS=$(TEST_THREADS) $(CARGO) test $(PROFILE) --locked --workspace -- --skip $(IN_TAB); others=$$?; \
	wait $$in_tab; in_tab=$$?; cat target/in-tab.log; exit $$((others + in_tab))
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(PROFILE) --locked --workspace --no-deps --document-private-items

# The properties of random inputs with so many cases of each, from each of two seeds: about twenty minutes each on one thread
# (docs/testing.md). `make test` tries headers of files 200,000 times. A seed of a failure is kept in tests/proptest-regressions.
FUZZ_FRAMES := 40000000
FUZZ_BODIES := 100000
FUZZ_SCHEMAS := 6000
FUZZ_TEMPLATES := 250000

# $(1) cases of the property $(3) of the headers of $(2); both tests must be there.
fuzz-headers = KIMI_LINEAR_FUZZ_CASES=$(1) $(CARGO) test $(PROFILE) --locked --lib -- --nocapture --exact \
	$(foreach seed,fixed drawn,checkpoint::$(2)::tests::mutated::$(seed)::$(3)) | tee /dev/stderr | grep -q '2 passed'

fuzz: install-rust-components
	$(call fuzz-headers,210000000,gguf,any_bytes_after_the_magic_are_read_or_refused)
	$(call fuzz-headers,215000000,gguf,headers_with_other_bytes_are_read_or_refused)
	$(call fuzz-headers,120000000,gguf,headers_with_other_numbers_are_read_or_refused)
	$(call fuzz-headers,300000000,header,headers_with_other_bytes_are_read_or_refused)
	$(call fuzz-headers,75000000,header,headers_with_other_numbers_are_read_or_refused)
	KIMI_LINEAR_FUZZ_CASES=$(FUZZ_FRAMES) $(CARGO) test $(PROFILE) --locked --test wire -- --nocapture fuzz::received
	KIMI_LINEAR_FUZZ_CASES=$(FUZZ_BODIES) $(CARGO) test $(PROFILE) --locked --test server -- --nocapture fuzz::requests::
	KIMI_LINEAR_FUZZ_CASES=$(FUZZ_SCHEMAS) $(CARGO) test $(PROFILE) --locked --test server -- --nocapture fuzz::schemas::
	KIMI_LINEAR_FUZZ_CASES=$(FUZZ_TEMPLATES) $(CARGO) test $(PROFILE) --locked --test server -- --nocapture fuzz::templates::

# How long hostile clients go on; `make test` has two rounds of them.
ABUSE_MINUTES := 60

abuse: install-rust-components
	KIMI_LINEAR_ABUSE_MINUTES=$(ABUSE_MINUTES) $(CARGO) test $(PROFILE) --locked --test server -- --nocapture hostile::

# Faults of each seed and number of processes; `make test` has five of them.
NODE_FAULTS := 25

nodes: install-rust-components
	KIMI_LINEAR_NODE_FAULTS=$(NODE_FAULTS) $(CARGO) test $(PROFILE) --locked --test server -- --nocapture nodes::

# Schedules of each seed; `make test` has twelve of them.
BURST_SCHEDULES := 200

bursts: install-rust-components
	KIMI_LINEAR_BURST_SCHEDULES=$(BURST_SCHEDULES) $(CARGO) test $(PROFILE) --locked --test data_parallel -- --nocapture random::

# The clients that `make test` has no time for, in Python environments of their own: guidellm has other dependencies than the rest.
target/clients/%/made: tests/clients/requirements-%.txt
	@python3 -c 'import ensurepip, venv' 2>/dev/null || .ci/install-packages python3 python3-venv
	@rm -rf target/clients/$*
	@python3 -m venv target/clients/$*
	@target/clients/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

clients: install-rust-components target/clients/openai/made target/clients/guidellm/made
	$(CARGO) build $(PROFILE) --locked
	python3 tests/clients/run.py target/release/kimi-linear

# llama.cpp as npm has it built.
target/llama-cpp/made: Makefile | install-node
	@rm -rf target/llama-cpp; mkdir -p target/llama-cpp
	@npm install --prefix target/llama-cpp --silent --no-audit --no-fund --ignore-scripts --no-package-lock --omit=optional \
	    node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	@touch $@

llama-cpp: install-rust-components target/llama-cpp/made
	$(CARGO) build $(PROFILE) --locked
	cd target/llama-cpp && node $(CURDIR)/tests/clients/llama_cpp.mjs $(CURDIR)/target/release/kimi-linear files

bench: install-rust-components
	$(CARGO) bench --locked

# What a machine without NVRTC is given; the test also holds registers, spills and docs/kernels.md.
kernels: install-rust-components install-cuda-compiler
	$(CARGO) test $(PROFILE) --locked --test cuda_kernels

archive: kernels install-window
	$(CARGO) build $(PROFILE) --locked --workspace --bins
	.ci/archive

# What builds Dynamo's crates.
install-cluster-tools: install-rust-components
	@for name in protoc clang cmake; do command -v $$name >/dev/null || { .ci/install-packages protobuf-compiler libclang-dev clang cmake g++; break; }; done

# Cargo reads cluster/.cargo/config.toml only there.
cluster: install-cluster-tools
	cd cluster && $(CARGO) build $(PROFILE) --locked

CLUSTER_DEMO_FLAGS :=

cluster-demo: cluster
	@command -v ip >/dev/null || .ci/install-packages iproute2
	@case '$(CLUSTER_DEMO_FLAGS)' in *--etcd*) command -v etcd >/dev/null || .ci/install-packages etcd-server;; esac
	cluster/target/release/kimi-linear-cluster-demo --out target/cluster-demo $(CLUSTER_DEMO_FLAGS)

# Dynamo's own frontend from PyPI, which serves the same workers. Without dependencies: aisimulate is a placeholder there, and the frontend
# needs neither that nor transformers.
target/dynamo/made: cluster/tests/requirements-dynamo.txt
	@python3 -c 'import ensurepip, venv' 2>/dev/null || .ci/install-packages python3 python3-venv
	@rm -rf target/dynamo
	@python3 -m venv target/dynamo
	@target/dynamo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

test-cluster: install-cluster-tools target/dynamo/made
	@command -v ip >/dev/null || .ci/install-packages iproute2
	@command -v etcd >/dev/null || .ci/install-packages etcd-server
	$(CARGO) fmt --manifest-path cluster/Cargo.toml --check
	cd cluster && $(CARGO) clippy $(PROFILE) --locked --all-targets -- -D warnings
	cd cluster && $(CARGO) build $(PROFILE) --locked --bins
	cd cluster && $(CARGO) test $(PROFILE) --locked
	cd cluster && KIMI_LINEAR_DYNAMO_PYTHON=$(CURDIR)/target/dynamo/bin/python $(CARGO) test $(PROFILE) --locked --test cluster -- --ignored

# The library alone and with each feature, and the program without a GPU backend.
features: install-rust-components
	$(CARGO) check $(PROFILE) --locked --lib --no-default-features
	$(CARGO) check $(PROFILE) --locked --lib --no-default-features --features server
	$(CARGO) check $(PROFILE) --locked --lib --no-default-features --features transfer
	$(CARGO) check $(PROFILE) --locked --lib --no-default-features --features wgpu
	$(CARGO) check $(PROFILE) --locked --lib --no-default-features --features cuda
	$(CARGO) check $(PROFILE) --locked --bins --no-default-features --features cli
	$(CARGO) check $(PROFILE) --locked --bins --no-default-features --features cli,server

# Duplicate versions, licences and sources of what is depended on, by deny.toml.
audit: install-rust-components
	@command -v cargo-deny >/dev/null || $(CARGO) +stable install --locked cargo-deny
	$(CARGO) deny --locked --workspace check bans licenses sources
	$(CARGO) deny --locked --manifest-path cluster/Cargo.toml check licenses sources

# The image for `serve`.
image:
	docker build --tag kimi-linear .

clean:
	$(CARGO) clean
