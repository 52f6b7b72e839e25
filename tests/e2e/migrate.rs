//! `tm-manager migrate`: killed anywhere, it leaves one schema or the other; older programs leave newer ones alone.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tm_tests::{Output, PATIENCE, bin, is_long, postgres::Postgres, strace::Line, wait_for};

/// Kill points of one engine.
const POINTS: usize = 20;

/// The migrations as they are in the repository, in order.
fn migrations() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manager/src/store/migrations");
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .expect("they are there")
        .map(|entry| entry.expect("they can be listed").path())
        .collect();
    files.sort();
    files
}

/// A manager's folder whose database has nothing in it.
fn manager(folder: &Path, database: Option<&str>) -> PathBuf {
    let data = folder.join("manager");
    let mut init = Command::new(bin("tm-manager"));
    init.args(["init", "--public-name", "m", "--agent-listen", "127.0.0.1:1"]);
    init.args(["--admin-listen", "127.0.0.1:2", "--data"]).arg(&data);
    if let Some(url) = database {
        init.args(["--database", url]);
    }
    Output::from(init.output().expect("programs can be run")).expect(0);
    data
}

fn migrate(data: &Path) -> Line {
    let args = ["migrate".into(), "--data".into(), data.as_os_str().to_owned()];
    Line { program: bin("tm-manager"), args: args.to_vec(), rules: vec![] }
}

/// Kills the program at calls spread over all that it makes, each time on an empty database; `standing` says which
/// schema that leaves (how many migrations, and everything that they make). Returns the schemas seen.
fn kill_everywhere(
    line: &Line,
    call: &str,
    total: usize,
    empty: impl Fn(),
    standing: impl Fn() -> (usize, String),
    whole: &[String],
) -> BTreeSet<usize> {
    let points = if is_long() { total } else { POINTS.min(total) };
    let (mut seen, mut missed) = (BTreeSet::new(), 0);
    for point in 0..points {
        let nth = 1 + point * total / points;
        empty();
        let output = line.inject(&[format!("{call}:signal=SIGKILL:when={nth}")]);
        // Which thread writes the last pages, and so counts them, differs from run to run.
        if output.code() == 0 {
            missed += 1;
            assert!(nth * 2 > total && missed * 2 < points, "not killed at {call} {nth} of {total}");
            continue;
        }
        let (number, schema) = standing();
        assert_eq!(
            schema, whole[number],
            "killed at {call} {nth}: the schema {number}, whole and nothing more"
        );
        seen.insert(number);
        let output = line.run().expect(0);
        let before = match number {
            0 => "0000".to_owned(),
            step => migrations()[step - 1].file_name().and_then(|name| name.to_str()).unwrap_or("?")[..4]
                .to_owned(),
        };
        assert!(output.out().contains(&format!("before: {before}")), "{}", output.both());
        assert_eq!(standing(), (whole.len() - 1, whole[whole.len() - 1].clone()), "killed at {call} {nth}");
    }
    seen
}

/// How often a clean run makes a call.
fn count(line: &Line, call: &str) -> usize {
    let log = tempfile::NamedTempFile::new().expect("temporary files work");
    let traced = Command::new("strace")
        .args(["-f", "-qqq", "-e", &format!("trace={call}"), "-o"])
        .arg(log.path())
        .arg(&line.program)
        .args(&line.args)
        .output()
        .expect("strace is installed");
    Output::from(traced).expect(0);
    let text = fs::read_to_string(log.path()).expect("strace wrote its log");
    // Counted for each thread apart, as strace injects.
    let mut threads = std::collections::BTreeMap::<&str, usize>::new();
    for line in text.lines().filter(|line| line.contains(&format!("{call}("))) {
        *threads.entry(line.split_whitespace().next().unwrap_or_default()).or_default() += 1;
    }
    threads.into_values().max().expect("it makes the call")
}

#[test]
fn killed_anywhere_on_sqlite_it_leaves_one_schema_or_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let data = manager(folder.path(), None);
    let database = data.join("manager.db");
    let sql = |database: &Path, text: &str| {
        let file = folder.path().join("statements.sql");
        fs::write(&file, text).unwrap();
        let output = Command::new("sqlite3")
            .arg("-bail")
            .arg(database)
            .stdin(fs::File::open(&file).unwrap())
            .output()
            .expect("sqlite3 is installed");
        let output = Output::from(output).expect(0);
        assert!(output.err().is_empty(), "{}", output.both());
        output.out()
    };
    let dump = |database: &Path| {
        let tables = "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE '!_sqlx%' ESCAPE '!'
                      AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY name";
        let mut all = sql(database, tables);
        if all.contains("CREATE TABLE counter") {
            all.push_str(&sql(database, "SELECT name, value FROM counter ORDER BY name"));
        }
        all
    };
    let reference = folder.path().join("reference.db");
    let mut whole = vec![String::new()];
    for file in migrations() {
        sql(&reference, &fs::read_to_string(file).unwrap());
        whole.push(dump(&reference));
    }
    let empty = || {
        for suffix in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(data.join(format!("manager.db{suffix}")));
        }
    };
    let standing = || {
        assert_eq!(sql(&database, "PRAGMA integrity_check").trim(), "ok");
        let tables = sql(&database, "SELECT count(*) FROM sqlite_master WHERE name = '_sqlx_migrations'");
        let number = if tables.trim() == "0" {
            0
        } else {
            sql(&database, "SELECT count(*) FROM _sqlx_migrations").trim().parse().unwrap()
        };
        (number, dump(&database))
    };
    let line = migrate(&data);
    empty();
    let total = count(&line, "pwrite64");
    let seen = kill_everywhere(&line, "pwrite64", total, empty, standing, &whole);
    assert!(seen.len() > whole.len() / 2, "killed between {seen:?} only, of {total} calls");
}

#[test]
fn killed_anywhere_on_postgresql_it_leaves_one_schema_or_the_other() {
    let postgres = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let data = manager(folder.path(), Some(&postgres.database("killed")));
    let dump = |database: &str| {
        let columns = "SELECT table_name, column_name, data_type, is_nullable, column_default
                       FROM information_schema.columns
                       WHERE table_schema = 'public' AND table_name NOT LIKE '!_sqlx%' ESCAPE '!' ORDER BY 1, 2";
        let indexes = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
                       AND tablename NOT LIKE '!_sqlx%' ESCAPE '!' ORDER BY 1";
        let mut all = postgres.sql(database, columns) + &postgres.sql(database, indexes);
        if all.contains("counter|name") {
            all.push_str(&postgres.sql(database, "SELECT name, value FROM counter ORDER BY name"));
        }
        all
    };
    postgres.database("reference");
    let mut whole = vec![String::new()];
    for file in migrations() {
        postgres.sql("reference", &fs::read_to_string(file).unwrap());
        whole.push(dump("reference"));
    }
    let empty = || {
        postgres.sql("killed", "DROP SCHEMA public CASCADE");
        postgres.sql("killed", "CREATE SCHEMA public");
    };
    let standing = || {
        // The server may still be at what it was last sent.
        let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'killed'";
        wait_for("the server to notice", PATIENCE, || {
            (postgres.sql("postgres", others) == "0").then_some(())
        });
        let number = match postgres.sql("killed", "SELECT to_regclass('_sqlx_migrations')").as_str() {
            "" => 0,
            _ => postgres.sql("killed", "SELECT count(*) FROM _sqlx_migrations").parse().unwrap(),
        };
        (number, dump("killed"))
    };
    let line = migrate(&data);
    empty();
    let total = count(&line, "sendto");
    let seen = kill_everywhere(&line, "sendto", total, empty, standing, &whole);
    assert!(seen.len() > whole.len() / 2, "killed between {seen:?} only, of {total} calls");
}

#[test]
fn a_newer_database_is_refused_by_name_and_an_older_one_waits_for_who_works_with_it() {
    let postgres = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let data = manager(folder.path(), Some(&postgres.database("store")));
    let serve = || {
        let output = Command::new("timeout")
            .args(["20"])
            .arg(bin("tm-manager"))
            .args(["serve", "--data"])
            .arg(&data)
            .output();
        Output::from(output.unwrap())
    };
    postgres.sql(
        "store",
        "INSERT INTO _sqlx_migrations (version, description, installed_on, success, checksum, execution_time)
         SELECT 9999, 'tomorrow', installed_on, success, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
    );
    for output in [serve(), migrate(&data).run()] {
        let output = output.expect(1);
        assert!(output.err().contains("9999 tomorrow"), "{}", output.both());
    }
    // As a database is whose newest step is not done yet, while another manager works on it.
    for _ in 0..2 {
        postgres.sql(
            "store",
            "DELETE FROM _sqlx_migrations WHERE version = (SELECT max(version) FROM _sqlx_migrations)",
        );
    }
    postgres.sql(
        "store",
        "INSERT INTO manager (id, addresses, beat, is_up, seen_ms)
         VALUES ('00000000-0000-4000-8000-000000000001', '[]', 1, 1, 0)",
    );
    let output = serve().expect(1);
    assert!(output.err().contains("00000000-0000-4000-8000-000000000001"), "{}", output.both());
    assert!(output.err().contains("tm-manager migrate"), "{}", output.both());
}
