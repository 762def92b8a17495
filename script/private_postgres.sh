# A PostgreSQL tree and clusters of our own, sourced by demo, test and bench.
#
# The tree has copies of the server's programs and links to everything else. PostgreSQL
# finds its files relative to its program, so keyvault installs into the tree and the
# system's own PostgreSQL is neither changed nor disturbed.

PG_MAJOR=${PG_MAJOR:-15}
PG_SYSTEM_BIN=/usr/lib/postgresql/$PG_MAJOR/bin

die() {
	echo "$0: $*" >&2
	exit 1
}

# Run a command as the user that PostgreSQL runs as, as it refuses to run as root; in a
# folder that this user can enter, which the clone need not be.
as_postgres() {
	if [ "$(id -u)" = 0 ]; then
		(cd / && runuser -u postgres -- "$@")
	else
		"$@"
	fi
}

# private_tree DIR: make the tree, and set PG_BIN to its programs.
private_tree() {
	local tree=$1 directory
	[ -x "$PG_SYSTEM_BIN/pg_config" ] || die "PostgreSQL $PG_MAJOR is not installed: run script/bootstrap"
	PG_BIN=$tree/usr/lib/postgresql/$PG_MAJOR/bin
	mkdir -p "$tree/usr/share/postgresql" "$tree/usr/lib/postgresql/$PG_MAJOR" "$tree/usr/share/doc"
	cp -rL "$PG_SYSTEM_BIN" "$tree/usr/lib/postgresql/$PG_MAJOR/bin"
	cp -rs "/usr/lib/postgresql/$PG_MAJOR/lib" "$tree/usr/lib/postgresql/$PG_MAJOR/lib"
	cp -rs "/usr/share/postgresql/$PG_MAJOR" "$tree/usr/share/postgresql/$PG_MAJOR"
	# keyvault of an earlier installation stays outside.
	find "$tree" -name 'keyvault*' -delete
	for directory in /usr/include /usr/lib/"$(gcc -print-multiarch)"; do
		mkdir -p "$tree$(dirname "$directory")"
		ln -s "$directory" "$tree$directory"
	done
	export PG_BIN
	export PATH="$PG_BIN:$PATH"
}

# build_into_tree SOURCE: build keyvault there and install it into the tree. More arguments go to make.
build_into_tree() {
	local source=$1
	shift
	make -s -C "$source" -j"$(nproc)" with_llvm=no PG_CONFIG="$PG_BIN/pg_config" "$@" &&
	make -s -C "$source" install with_llvm=no PG_CONFIG="$PG_BIN/pg_config" "$@" > /dev/null
}

# portable_install DIR ROOT: copy the tree's server with what is installed in it to DIR/usr, and to DIR/lib the shared
# libraries that it needs and the system in the folder ROOT lacks.
portable_install() {
	local directory=$1 root=$2 tree=${PG_BIN%/usr/lib/*} libraries library
	libraries=/usr/lib/$(gcc -print-multiarch)
	mkdir -p "$directory/usr/lib/postgresql" "$directory/usr/share/postgresql" "$directory/lib"
	cp -rL "$tree/usr/share/postgresql/$PG_MAJOR" "$directory/usr/share/postgresql"
	(cd -P "$tree/usr/lib/postgresql" && tar chf - --exclude=bitcode --exclude=pgxs --exclude='llvmjit*' "$PG_MAJOR") | tar xf - -C "$directory/usr/lib/postgresql"
	find "$directory/usr/lib/postgresql" -type f -exec ldd {} + 2> /dev/null | sed -n 's/.* => \(\/[^ ]*\) (.*/\1/p' | sort -u | while read -r library; do
		[ -e "$root$libraries/${library##*/}" ] || cp -L "$library" "$directory/lib"
	done
}

# make_master_key FILE: as openssl rand -hex 32 does, readable by its owner alone.
make_master_key() {
	(umask 077 && openssl rand -hex 32 > "$1")
}

# make_cluster DIR [CONFIGURATION-FILE]: a cluster in DIR/data that listens on a socket in DIR only.
make_cluster() {
	local directory=$1 configuration=${2:-}
	mkdir -p "$directory"
	[ "$(id -u)" = 0 ] && chown postgres "$directory"
	as_postgres "$PG_BIN/initdb" -D "$directory/data" -U postgres -A trust -E UTF8 --locale=C.UTF-8 > "$directory/initdb.log" ||
		die "initdb failed: see $directory/initdb.log"
	as_postgres bash -c "$(declare -f make_master_key); make_master_key \"\$1\"" - "$directory/master.key"
	as_postgres tee -a "$directory/data/postgresql.conf" > /dev/null <<-CONF
		listen_addresses = ''
		unix_socket_directories = '$directory'
		shared_preload_libraries = 'keyvault'
		keyvault.master_key_file = '$directory/master.key'
	CONF
	if [ -n "$configuration" ]; then
		as_postgres tee -a "$directory/data/postgresql.conf" < "$configuration" > /dev/null
	fi
}

start_cluster() {
	as_postgres "$PG_BIN/pg_ctl" -D "$1/data" -l "$1/server.log" -w -s start || die "the server did not start: see $1/server.log"
}

stop_cluster() {
	[ -f "$1/data/postmaster.pid" ] || return 0
	as_postgres "$PG_BIN/pg_ctl" -D "$1/data" -m "${2:-fast}" -w -s stop
}
