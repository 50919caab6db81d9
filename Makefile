# make demo   trains, fine-tunes privately, samples and evaluates on the embedded data (offline once installed)
# make test   lints and tests
PYTHON := .venv/bin/python
RUN := runs/glyphs

.PHONY: demo test clean

.venv/installed: requirements.txt pyproject.toml
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements.txt pytest==9.2.0 ruff==0.17.6
	touch $@

test: .venv/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest

# Both fine-tunings run side by side, each on one core: that uses two cores better than two threads do.
demo: .venv/installed $(RUN)/public.pt
	OMP_NUM_THREADS=1 $(MAKE) -j2 $(RUN)/eps10.npz $(RUN)/eps1.npz
	$(PYTHON) evaluate.py $(RUN)/eps1.npz $(RUN)/eps10.npz --real digits --ceiling --steps 250 --json $(RUN)/results.json --overwrite
	$(PYTHON) sample.py $(RUN)/public.pt $(RUN)/private-eps10.pt $(RUN)/private-eps1.pt --real digits --guidance 2.5 --grid $(RUN)/samples.png --caption-from $(RUN)/results.json

$(RUN)/%.npz: $(RUN)/private-%.pt
	$(PYTHON) sample.py $< --npz $@ --count 1000 --guidance 2.5

$(RUN)/private-eps%.pt: | $(RUN)/public.pt
	$(PYTHON) train.py --stage private --eps $* --resume

$(RUN)/public.pt: | .venv/installed
	$(PYTHON) train.py --stage public

.PRECIOUS: $(RUN)/%.npz $(RUN)/private-eps%.pt $(RUN)/public.pt

clean:
	rm -rf runs data/cache
