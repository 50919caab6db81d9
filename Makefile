# make help   lists what there is
REQUIREMENTS := requirements.txt
PYTHON := .venv/bin/python
RUN := runs/glyphs

.PHONY: help demo test test-core faults lint clean

help:
	@echo "make demo       train, fine-tune privately, sample, evaluate: rendered data, offline"
	@echo "make test       lint and all tests"
	@echo "make test-core  only the tests of the seven files, a minute"
	@echo "make faults     put deliberate faults into the code: do the tests catch them?"
	@echo "make clean      delete runs/ and rendered data"
	@echo "REQUIREMENTS=FILE  with any of these: install the packages in FILE (default $(REQUIREMENTS))"

.venv/installed: $(REQUIREMENTS)
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r $(REQUIREMENTS)
	touch $@

lint: .venv/installed
	$(PYTHON) -m ruff check .

test-core: lint
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/core

test: test-core
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --ignore tests/core

faults: .venv/installed
	$(PYTHON) tests/faults.py

# Both fine-tunings run side by side, each on one core: that uses two cores better than two threads.
demo: .venv/installed $(RUN)/public.pt
	OMP_NUM_THREADS=1 $(MAKE) -j2 $(RUN)/eps10.npz $(RUN)/eps1.npz
	$(PYTHON) evaluate.py $(RUN)/eps1.npz $(RUN)/eps10.npz --real digits --real-baseline --steps 250 \
		--json $(RUN)/results.json --overwrite
	$(PYTHON) sample.py $(RUN)/public.pt $(RUN)/private-eps10.pt $(RUN)/private-eps1.pt \
		--real digits --guidance 2.5 --grid $(RUN)/samples.png --caption-from $(RUN)/results.json

$(RUN)/%.npz: $(RUN)/private-%.pt
	$(PYTHON) sample.py $< --npz $@ --count 1000 --guidance 2.5

$(RUN)/private-eps%.pt: | $(RUN)/public.pt
	$(PYTHON) train.py --stage private --eps $* --resume

$(RUN)/public.pt: | .venv/installed
	$(PYTHON) train.py --stage public

.PRECIOUS: $(RUN)/%.npz $(RUN)/private-eps%.pt $(RUN)/public.pt

clean:
	rm -rf runs data/cache
