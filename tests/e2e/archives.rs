//! Archives: what the formats' own programs make is looked into, and what is made to be hard to read is bounded.
//!
//! The control of every archive is the program that is planted in it: a marker that only unpacking finds, behind
//! machine code, which is what filters change. Sums tell whether all of it came out as it went in.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use flate2::{Compression, write::GzEncoder};
use serde_json::Value;
use tm_tests::{Output, bin, samples, standalone};

/// Finds the program that is planted.
const RULE: &str = "rule planted { strings: $a = \"planted-marker-47\" condition: $a }";

/// What is to be said of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    /// The marker is found in a member, and everything was looked at.
    Found,
    /// It could not be read without a password, and nothing else is wrong.
    Encrypted,
    /// Something in it was not looked at, for this reason.
    Skipped(&'static str),
}

/// An archive: its name, the program that makes it, and how, as a script.
type Recipe = (String, &'static str, String, Said);

/// Methods of 7z, and filters that stand in front of one.
const SEVENZ: [&str; 21] = [
    "-m0=copy",
    "-m0=lzma",
    "-m0=lzma2",
    "-m0=ppmd",
    "-m0=bzip2",
    "-m0=deflate",
    "-m0=deflate64",
    "-m0=lzma2:d=64m -mx=9",
    "-m0=bcj -m1=lzma2",
    "-m0=bcj2 -m1=lzma2 -m2=lzma:d=64k -m3=lzma:d=64k -mb0s0:1 -mb0s1:2 -mb0s2:3",
    "-m0=arm -m1=lzma2",
    "-m0=armt -m1=lzma2",
    "-m0=arm64 -m1=lzma2",
    "-m0=riscv -m1=lzma2",
    "-m0=ppc -m1=lzma2",
    "-m0=sparc -m1=lzma2",
    "-m0=ia64 -m1=lzma2",
    "-m0=delta:1 -m1=lzma",
    "-m0=delta:256 -m1=bzip2",
    "-m0=lzma2 -ms=off",
    "-m0=lzma2 -mhc=off",
];

fn recipes() -> Vec<Recipe> {
    let mut all = Vec::new();
    let mut add = |name: &str, program: &'static str, script: &str, said| {
        all.push((name.to_owned(), program, script.to_owned(), said));
    };
    let sevenz = |options: &str| format!("7z a -bso0 -bsp0 {options} $OUT hay.txt prog");
    for (number, options) in SEVENZ.iter().enumerate() {
        add(&format!("{number}.7z"), "7z", &sevenz(options), Said::Found);
    }
    add("password.7z", "7z", &sevenz("-psecret"), Said::Encrypted);
    add("hidden.7z", "7z", &sevenz("-psecret -mhe=on"), Said::Encrypted);
    let volume = format!("{}; mv $OUT.001 $OUT; rm -f $OUT.0*", sevenz("-v10k"));
    add("volume.7z", "7z", &volume, Said::Skipped("malformed"));
    let update = format!("{}; 7z a -bso0 -bsp0 $OUT more.txt; 7z d -bso0 -bsp0 $OUT hay.txt", sevenz(""));
    add("updated.7z", "7z", &update, Said::Found);
    for method in ["copy", "deflate", "deflate64", "bzip2", "lzma", "xz", "ppmd"] {
        let script = sevenz(&format!("-tzip -mm={method}"));
        add(&format!("{method}.zip"), "7z", &script, Said::Found);
    }
    add("aes.zip", "7z", &sevenz("-tzip -psecret -mem=AES256"), Said::Encrypted);
    for options in ["-0", "-9", "-Z bzip2", "-fz"] {
        let script = format!("zip -q {options} $OUT hay.txt prog");
        add(&format!("zip{}.zip", options.replace(' ', "")), "zip", &script, Said::Found);
    }
    add("stream.zip", "zip", "cat prog | zip -q - - > $OUT", Said::Found);
    add("password.zip", "zip", "zip -q -P secret $OUT hay.txt prog", Said::Encrypted);
    add("stored.cab", "gcab", "gcab -c -n $OUT hay.txt prog", Said::Found);
    add("mszip.cab", "gcab", "gcab -c -z -n $OUT hay.txt prog more.txt", Said::Found);
    for format in ["v7", "ustar", "oldgnu", "gnu", "pax"] {
        let script = format!("tar -c --format={format} hay.txt prog | gzip > $OUT");
        add(&format!("{format}.tar.gz"), "tar", &script, Said::Found);
    }
    add("sparse.tar.gz", "tar", "truncate -s 10M prog; tar -cSz -f $OUT prog", Said::Found);
    for format in ["newc", "crc", "odc", "bin"] {
        let script = format!("printf 'hay.txt\\nprog\\n' | cpio --quiet -o -H {format} | gzip > $OUT");
        add(&format!("{format}.cpio.gz"), "cpio", &script, Said::Found);
    }
    add("a.ar.gz", "ar", "ar rcS a.a hay.txt prog; gzip < a.a > $OUT", Said::Found);
    for (name, program, how) in [
        ("9.gz", "gzip", "gzip -9"),
        ("9.bz2", "bzip2", "bzip2 -9"),
        ("6.xz", "xz", "xz -6"),
        ("e.xz", "xz", "xz -9e --check=sha256"),
        ("blocks.xz", "xz", "xz --block-size=16384"),
        ("x86.xz", "xz", "xz --x86 --lzma2=preset=6"),
        ("delta.xz", "xz", "xz --delta=dist=4 --lzma2=preset=6"),
        ("6.lzma", "xz", "xz --format=lzma -6"),
        ("6.lz", "lzip", "lzip -6"),
        ("3.zst", "zstd", "zstd -q -3"),
        ("19.zst", "zstd", "zstd -q --ultra -22 --check"),
    ] {
        add(name, program, &format!("{how} < prog > $OUT"), Said::Found);
    }
    for how in ["gzip", "xz", "zstd"] {
        let script = format!(
            "mkdir -p d/DEBIAN d/usr; cp prog d/usr; chmod -R go-w d; \
             printf 'Package: a\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b>\\nDescription: a\\n' \
             > d/DEBIAN/control; dpkg-deb -Z{how} -b d $OUT > /dev/null"
        );
        add(&format!("{how}.deb"), "dpkg-deb", &script, Said::Found);
    }
    for how in ["w9.gzdio", "w9.bzdio", "w6.xzdio", "w6.lzdio", "w3.zstdio"] {
        let script = format!(
            "printf 'Name: a\\nVersion: 1\\nRelease: 1\\nSummary: a\\nLicense: a\\nBuildArch: noarch\\n\
             %%description\\na\\n%%install\\nmkdir -p %%{{buildroot}}/opt\\ncp %%{{_sourcedir}}/prog \
             %%{{buildroot}}/opt\\n%%files\\n/opt/prog\\n' > a.spec; \
             rpmbuild --quiet -bb --define \"_topdir $PWD/top\" --define \"_sourcedir $PWD\" \
             --define '_binary_payload {how}' --define '__os_install_post %{{nil}}' a.spec > log 2>&1; \
             mv top/RPMS/noarch/*.rpm $OUT"
        );
        add(&format!("{how}.rpm"), "rpmbuild", &script, Said::Found);
    }
    all
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Makes an archive in a folder of its own.
fn make(script: &str, out: &Path) {
    let folder = tempfile::tempdir().expect("temporary folders work");
    let path = folder.path();
    // A program of this processor, so that filters have something to change.
    let mut prog = fs::read("/bin/ls").expect("every system has it");
    prog.extend(b"planted-marker-47");
    fs::write(path.join("prog"), prog).expect("it is writable");
    fs::write(path.join("hay.txt"), "hay\n".repeat(20_000)).expect("it is writable");
    fs::write(path.join("more.txt"), "more hay\n").expect("it is writable");
    let mut command = Command::new("sh");
    command.args(["-ec", script]).env("OUT", out).current_dir(path).stdin(Stdio::null());
    let output: Output = command.output().expect("programs can be run").into();
    assert!(out.is_file(), "{script}: {}", output.both());
}

/// Lines of a kind, by the name of their file.
fn by_file(output: &Output, kind: &str) -> BTreeMap<String, Vec<Value>> {
    let mut all: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in standalone::lines(output, kind) {
        let name =
            line["path"].as_str().and_then(|path| path.rsplit('/').next()).unwrap_or_default().to_owned();
        all.entry(name).or_default().push(line);
    }
    all
}

#[test]
fn what_other_programs_make_is_looked_into_or_said() {
    let folder = tempfile::tempdir().unwrap();
    let made = recipes();
    let missing: Vec<&str> =
        made.iter().map(|(_, program, ..)| *program).filter(|program| !is_installed(program)).collect();
    assert!(missing.is_empty(), "`cargo xtask test` installs what is missing: {missing:?}");
    for (name, _, script, _) in &made {
        make(script, &folder.path().join(name));
    }
    let output = standalone::scan(RULE, folder.path(), &[]).expect(1);
    let (found, skipped) = (by_file(&output, "detection"), by_file(&output, "skipped"));
    for (name, _, script, said) in &made {
        let found = found.get(name).map(Vec::as_slice).unwrap_or_default();
        let within =
            found.iter().any(|line| line["member"].as_array().is_some_and(|names| !names.is_empty()));
        let reasons: Vec<&str> =
            skipped.get(name).into_iter().flatten().map(|line| line["reason"].as_str().unwrap()).collect();
        let right = match said {
            Said::Found => within && reasons.is_empty(),
            Said::Encrypted => {
                !within && !reasons.is_empty() && reasons.iter().all(|reason| *reason == "encrypted")
            }
            Said::Skipped(reason) => reasons.contains(reason),
        };
        assert!(right, "{name} ({script}): found within: {within}, skipped: {reasons:?}");
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::best());
    std::io::Write::write_all(&mut out, bytes).expect("memory can be written to");
    out.finish().expect("memory can be written to")
}

/// Runs a scan whose processes may have `mebibytes` of memory to write to, each.
fn scan_within(mebibytes: u64, folder: &Path) -> Output {
    let rule = tempfile::NamedTempFile::new().expect("temporary folders work");
    fs::write(rule.path(), RULE).expect("it is writable");
    let output = Command::new("prlimit")
        .arg(format!("--data={}", mebibytes << 20))
        .arg(bin("tm-agent"))
        .args(["scan", "--standalone", "--threads", "2", "-o", "json", "--pattern"])
        .args([rule.path(), Path::new("--"), folder])
        .output();
    output.expect("programs can be run").into()
}

/// What takes the most memory: much that comes out, large dictionaries, large models, one within another.
fn heavy(folder: &Path) {
    let path = folder.to_str().expect("temporary folders have plain names");
    let script = format!(
        "head -c 1M /dev/urandom > seed; for n in $(seq 190); do cat seed; done > much; cat prog >> much; \
         head -c 2M much > some; cat prog >> some; \
         make() {{ out=$1; shift; 7z a -bso0 -bsp0 -mx=1 -mmt=1 {path}/$out \"$@\"; }}; \
         make solid.7z -m0=lzma:d=256m much prog hay.txt; \
         make copy.7z -m0=copy much; \
         make twice.7z -m0=copy {path}/copy.7z; \
         make model.7z -m0=ppmd:mem=256m:o=8 some; \
         make model.zip -tzip -mm=ppmd:mem=256m some; \
         make nested.7z -m0=ppmd:mem=128m:o=8 {path}/model.7z {path}/solid.7z; \
         head -c 16M much | xz -0 --lzma2=preset=0,dict=256MiB > {path}/much.xz; \
         zstd -q -3 --long=27 < much > {path}/much.zst; \
         touch $OUT"
    );
    let done = folder.join("done");
    make(&script, &done);
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.join(name), bytes).expect("it is writable");
    fs::remove_file(done).expect("it was made");
    write("zeros.gz", gzip(&vec![0; 300 << 20]));
    write("dictionary.lzma", [&b"\x5d\xff\xff\xff\xff"[..], &[0xff; 8], &[0; 40]].concat());
    let mut deep = samples::eicar();
    for _ in 0..40 {
        deep = gzip(&deep);
    }
    write("deep.gz", deep);
}

#[test]
fn the_worst_archives_fit_in_512_mebibytes_and_20_seconds() {
    let folder = tempfile::tempdir().unwrap();
    heavy(folder.path());
    let files = fs::read_dir(folder.path()).unwrap().count();
    let output = scan_within(512, folder.path());
    let said = |output: &Output| -> Vec<String> {
        let skipped = standalone::lines(output, "skipped");
        skipped.iter().map(|line| format!("{} {}", line["path"], line["reason"])).collect()
    };
    let skips = said(&output);
    // A worker that asked for more would have said so, even if another one then did its work.
    assert_eq!(output.err(), "");
    assert!(skips.iter().all(|line| line.ends_with("\"limit\"")), "{skips:?}");
    let summary = standalone::lines(&output, "summary");
    assert_eq!(summary[0]["files"], files, "{}", output.both());
    let seconds = summary[0]["cpu_s"].as_f64().unwrap();
    assert!(seconds < 20.0, "{seconds} s of CPU for {files} files");
    // What is worst is limited, and what fits is found.
    let (found, skipped) = (by_file(&output, "detection"), by_file(&output, "skipped"));
    for name in ["solid.7z", "zeros.gz", "dictionary.lzma", "deep.gz"] {
        assert!(skipped.contains_key(name), "{name}: {skips:?}");
    }
    for name in ["solid.7z", "copy.7z", "model.7z", "model.zip"] {
        assert!(found.contains_key(name), "{name}: {skips:?}");
    }
    // The control: the ceiling is one, and a worker that needs more ends or says so.
    let less = scan_within(64, folder.path());
    assert!(
        said(&less).iter().any(|line| line.contains("worker-died")) || !less.err().is_empty(),
        "{}",
        less.both()
    );
}
