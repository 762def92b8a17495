EXTENSION = keyvault
EXTVERSION := $(shell sed -n "s/^default_version *= *'\(.*\)'.*/\1/p" keyvault.control)
PGFILEDESC = "keyvault - vault, meter and gateway for AI-provider keys"

MODULE_big = keyvault
OBJS = $(patsubst %.c,%.o,$(wildcard src/*.c src/*/*.c))
SQL_PARTS = $(sort $(wildcard sql/[0-9]*.sql))
DATA_built = $(EXTENSION)--$(EXTVERSION).sql
DATA = $(wildcard sql/$(EXTENSION)--*--*.sql)
DOCS = doc/keyvault.md

REGRESS = $(patsubst test/sql/%.sql,%,$(sort $(wildcard test/sql/*.sql)))
REGRESS_OPTS = --inputdir=test
ISOLATION = $(patsubst test/specs/%.spec,%,$(sort $(wildcard test/specs/*.spec)))
ISOLATION_OPTS = --inputdir=test --outputdir=.
TAP_TESTS = 1
PROVE_TESTS = test/t/*.pl
PROVE_FLAGS += -I test/perl
EXTRA_CLEAN = results output_iso regression.diffs regression.out tmp_check src/*.gcno src/*.gcda src/*/*.gcno src/*/*.gcda

PG_CPPFLAGS = -I$(srcdir)/src -DKV_VERSION='"$(EXTVERSION)"'
SHLIB_LINK = -lcurl -lssl -lcrypto

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

$(DATA_built): $(SQL_PARTS) keyvault.control
	cat $(SQL_PARTS) > $@

$(OBJS): $(wildcard src/*.h src/*/*.h) keyvault.control

# The bundle for PGXN: what is committed, but for what .gitattributes leaves out.
DIST_TREE =
DIST_DIR = .
dist:
	git archive --format=zip --prefix=$(EXTENSION)-$(EXTVERSION)/ -o $(DIST_DIR)/$(EXTENSION)-$(EXTVERSION).zip $(or $(DIST_TREE),HEAD)

.PHONY: demo bench lint format dist

demo:
	./script/demo

bench:
	./script/bench

lint:
	./test/lint/run

format:
	clang-format -i $(wildcard src/*.[ch] src/*/*.[ch])
