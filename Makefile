# make help   lists what there is
REQUIREMENTS := requirements.txt
PYTHON := .venv/bin/python
RUN := runs/glyphs
PUBLISHED := $(patsubst %,checkpoints/%.pt,mnist mnist-eps10 mnist-eps1 mnist-eps0.2)
# Processes side by side use the cores better than threads do.
export OMP_NUM_THREADS := 1
PROCESSES := 2
RESULTS := $(RUN)/real.json $(RUN)/eps10.json $(RUN)/eps1.json
EVALUATE := $(PYTHON) evaluate.py --real digits --steps 250 --overwrite

.PHONY: help samples demo test test-core faults lint clean

help:
	@echo "make samples    samples of the published MNIST checkpoints, in runs/samples.png"
	@echo "make demo       train, fine-tune privately, sample, evaluate: rendered data, offline"
	@echo "make test       lint and all tests"
	@echo "make test-core  only the tests of the seven files, a minute"
	@echo "make faults     put deliberate faults into the code: do the tests catch them?"
	@echo "make clean      delete runs/ and rendered data"
	@echo "PROCESSES=1     with make demo: where there is one core only (default 2)"
	@echo "REQUIREMENTS=FILE  with any of these: install the packages in FILE (default $(REQUIREMENTS))"

.venv/installed: $(REQUIREMENTS)
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r $(REQUIREMENTS)
	touch $@

samples: .venv/installed
	$(PYTHON) sample.py $(PUBLISHED) --guidance 2 --grid runs/samples.png

lint: .venv/installed
	$(PYTHON) -m ruff check .

test-core: lint
	$(PYTHON) -m pytest tests/core

test: test-core
	$(PYTHON) -m pytest --ignore tests/core

faults: .venv/installed
	$(PYTHON) tests/faults.py

# Two processes keep two cores busy throughout.
demo: .venv/installed $(RUN)/public.pt
	$(MAKE) -j$(PROCESSES) $(RESULTS)
	$(PYTHON) sample.py $(RUN)/public.pt $(RUN)/private-eps10.pt $(RUN)/private-eps1.pt \
		--real digits --guidance 2.5 --grid $(RUN)/samples.png --caption-from $(RESULTS)

$(RUN)/real.json: | $(RUN)/public.pt
	$(EVALUATE) --real-baseline --json $@

$(RUN)/%.json: $(RUN)/%.npz
	$(EVALUATE) $< --json $@

$(RUN)/%.npz: $(RUN)/private-%.pt
	$(PYTHON) sample.py $< --npz $@ --count 1000 --guidance 2.5

$(RUN)/private-eps%.pt: | $(RUN)/public.pt
	$(PYTHON) train.py --stage private --eps $* --resume

$(RUN)/public.pt: | .venv/installed
	$(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(PROCESSES) \
		train.py --stage public

.PRECIOUS: $(RUN)/%.npz $(RUN)/private-eps%.pt $(RUN)/public.pt

clean:
	rm -rf runs data/cache
