# Two environments: .venv holds what serving and querying need (no PyTorch); .venv-dev adds training, export and tests.
PYTHON ?= python3
SHARED_DATA ?= ../shared/data/cxr-public

# What Python has compiled is kept: tests start commands by the hundred, each of which would compile this package anew.
unexport PYTHONDONTWRITEBYTECODE

# Of the long forms of tests; a seed of nothing is another one each time.
SEEDS ?= 1 2 3 4 5
HARMED ?= 2000
RUNS ?= 60
SEED ?=
MINUTES ?= 20
FILES ?= 100000
SIZES ?= 100000 1000000

.PHONY: demo test test-real test-night chaos chaos-node soak soak-node fuzz image-check lint bench vendor screenshots map-speed cluster-speed growth-speed notebook clean prerequisites browser compose peers

demo: .venv/.installed          ## the whole path on synthetic radiographs
	@.venv/bin/cxr demo

# Two at a time and, beside them, what mostly waits for servers (tests/conftest.py); PyTorch of one thread each, for two of two threads on
# two cores wait for each other.
test: .venv-dev/.installed peers ## every test
	@OMP_NUM_THREADS=1 CXR_REAL_DATA=$(SHARED_DATA) .venv-dev/bin/python -m pytest --numprocesses 3 --dist loadfile

test-real: .venv-dev/.installed ## retrieval of every real radiograph against the published figure, with CXR_REAL_DATA or SHARED_DATA
	@CXR_REAL_DATA=$${CXR_REAL_DATA:-$(SHARED_DATA)} .venv-dev/bin/python -m pytest -m whole --timeout 7200 tests/real_data

fuzz: .venv-dev/.installed      ## harmed films through the reader: SEEDS="1 2 3" HARMED=2000 for each
	@.venv-dev/bin/python tests/fuzz.py $(SEEDS) --files $(HARMED)

test-night: .venv-dev/.installed ## the val split as an archive of DICOM files with planted identities, Triton killed three times; NIGHT="--gallery DIR.db" takes a filled one
	@PYTHONPATH=tests .venv-dev/bin/python -m chaos.night $${CXR_REAL_DATA:-$(SHARED_DATA)} $(NIGHT)

chaos: .venv-dev/.installed     ## each component killed, stalled and cut at random moments; counts what is lost, doubled or wrong. RUNS=60 SEED=
	@PYTHONPATH=tests .venv-dev/bin/python -m chaos.run --runs $(RUNS) $(if $(SEED),--seed $(SEED))

soak: .venv-dev/.installed      ## memory and descriptors over MINUTES=20 of everything at once, and over FILES=100000, twice
	@PYTHONPATH=tests .venv-dev/bin/python -m chaos.soak --minutes $(MINUTES) --files $(FILES)

soak-node: .venv-dev/.installed peers ## memory and descriptors of `cxr listen` over MINUTES=20 between a modality and an archive
	@PYTHONPATH=tests .venv-dev/bin/python -m chaos.soak --minutes 0 --node-minutes $(MINUTES) --out runs/soak-node

chaos-node: .venv-dev/.installed peers ## 1,000 films to `cxr listen`, killed 20 times: what is lost that was confirmed, and what answered twice. SEED=
	@SEED=$(SEED) .venv-dev/bin/python -m pytest -q -s -m whole tests/integration/test_listen.py tests/pacs/test_arrivals.py

# As root, for a chroot is made. Not a part of `test`: five minutes, and a gigabyte from package registries.
image-check: .venv-dev/.installed ## deploy/Dockerfile built for real, on Debian in place of NVIDIA's image
	@$(MAKE) --no-print-directory debian PACKAGES="$$(command -v buildah > /dev/null || echo buildah) $$(command -v mmdebstrap > /dev/null || echo mmdebstrap) $$(command -v cc > /dev/null || echo gcc)"
	@.venv-dev/bin/python tests/deploy/image_check.py

lint: .venv-dev/.installed      ## style, types and layers
	@.venv-dev/bin/ruff check .
	@.venv-dev/bin/ruff format --check .
	@.venv-dev/bin/basedpyright
	@.venv-dev/bin/lint-imports --no-logo --no-cache

bench: .venv-dev/.installed     ## speed as ratios in one run: bare engines, our service, what people would write instead
	@PYTHONPATH=tests .venv-dev/bin/python tests/benchmark/bench.py

cluster-speed: .venv-dev/.installed ## what clusters give and cost beside nearest neighbours, up to a million cases; an hour
	@PYTHONPATH=tests .venv-dev/bin/python tests/benchmark/clusters.py 1000 10000 100000 1000000

growth-speed: .venv-dev/.installed ## what an index of each kind finds and costs on a Milvus server, SIZES="100000 1000000 5000000"; hours, and 2 GB for each million
	@PYTHONPATH=tests .venv-dev/bin/python -W ignore tests/benchmark/growth.py $(SIZES)

# The page has no build step: these files are what npm has, but for the names by which they import each other.
VENDORED = client/cxr_retrieval/view/assets/vendor
vendor:                         ## the page's libraries anew from npm, in the versions that NOTICE.md names
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	sed -n 's/^| \(\S*\) | \(\S*\) | \(\S*\) | \(\S*\) |.*/\1 \2 \3 \4/p' $(VENDORED)/NOTICE.md | while read -r package version from to; do \
	  case "$$to" in *.js) ;; *) continue ;; esac; \
	  (cd "$$work" && rm -rf package && npm pack --silent "$$package@$$version" > /dev/null && tar xzf ./*.tgz && rm ./*.tgz); \
	  sed -E -e 's#from"preact"#from"./preact.js"#g; s#from"preact/hooks"#from"./hooks.js"#g; s#from"@preact/signals-core"#from"./signals-core.js"#g' \
	    -e 's#//\# sourceMappingURL=.*##' "$$work/package/$$from" > $(VENDORED)/$$to; \
	  cp "$$work/package/LICENSE" "$(VENDORED)/LICENSE-$${to%.js}"; \
	done

notebook: .venv-dev/.installed  ## docs/notebook.ipynb anew, executed over the demo's phantoms
	@PYTHONPATH=tests .venv-dev/bin/python tests/notebook.py

screenshots: .venv-dev/.installed browser ## the page as its tests see it, into screenshots/; look at them
	@CXR_SCREENSHOTS=screenshots .venv-dev/bin/python -m pytest -q -m whole -k screenshots tests/browser

map-speed: .venv-dev/.installed browser ## how fluently a map of 50,000 points is panned, in Chromium; minutes
	@.venv-dev/bin/python -m pytest -q -s -m whole -k fifty_thousand tests/browser

clean:                          ## remove environments and everything made by demo and tests
	rm -rf .venv .venv-dev cxr-demo .pytest_cache .ruff_cache .hypothesis

.venv/.installed: pyproject.toml constraints.txt | prerequisites
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[map,cluster,dicom]'
	@touch $@

# Compiled when imported, as most of its 19,000 modules never are.
.venv-dev/.installed: pyproject.toml constraints.txt | prerequisites
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

# What Debian's bare python3 lacks: venv, and libpython as a shared library (Triton's Python backend embeds it).
PY_VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
prerequisites:
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON); expected Python 3.10 to 3.12. Next: install it, or make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "error: Python $(PY_VERSION); expected 3.10 to 3.12. Next: make PYTHON=/path/to/python"; exit 2; }
	@missing=""; \
	$(PYTHON) -c 'import ensurepip' 2> /dev/null || missing="python$(PY_VERSION)-venv"; \
	$(PYTHON) -c 'import ctypes, pathlib, sysconfig; n = "libpython$(PY_VERSION).so.1.0"; (pathlib.Path(sysconfig.get_config_var("LIBDIR") or "/") / n).is_file() or ctypes.CDLL(n)' \
	  2> /dev/null || missing="$$missing libpython$(PY_VERSION)"; \
	$(MAKE) --no-print-directory debian PACKAGES="$$missing"

# One after the other, for each may ask apt.
browser: prerequisites
	@command -v chromium > /dev/null || $(MAKE) --no-print-directory debian PACKAGES=chromium

compose: browser                ## what checks compose.yaml: Docker's plugin if it is there, else Debian's docker-compose
	@docker compose version > /dev/null 2>&1 || command -v docker-compose > /dev/null || $(MAKE) --no-print-directory debian PACKAGES=docker-compose

peers: compose                  ## the archives and tools that tests of `cxr listen` and `cxr pull` talk to: dcmtk, Orthanc, dicom3tools
	@$(MAKE) --no-print-directory debian PACKAGES="$$(command -v storescu > /dev/null || echo dcmtk) $$(command -v dciodvfy > /dev/null || echo dicom3tools) \
	  $$(command -v Orthanc > /dev/null || echo orthanc) $$([ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] || echo orthanc-dicomweb)"

.PHONY: debian
debian:
	@if [ -z "$(strip $(PACKAGES))" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "installing Debian packages: $(strip $(PACKAGES))"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) > /dev/null; \
	else echo "error: missing $(strip $(PACKAGES)). Next: sudo apt-get install $(strip $(PACKAGES))"; exit 2; fi
