//! Flipped bytes, cut files, foreign items: the vault opens, loses only what was touched, and says so.

use std::{fs, path::PathBuf};

use tm_tests::{
    is_long,
    vault::{Item, Vault, names},
};

/// A vault with some items in it, and where their files were.
struct Filled {
    _folder: tempfile::TempDir,
    files: PathBuf,
    vault: Vault,
    items: Vec<Item>,
}

const FILES: usize = 5;

fn filled() -> Filled {
    let folder = tempfile::tempdir().expect("temporary folders work");
    let files = folder.path().join("files");
    fs::create_dir(&files).expect("root writes here");
    let vault = Vault::new(&folder.path().join("state"));
    for n in 0..FILES {
        let path = files.join(format!("file{n}"));
        fs::write(&path, format!("content of {n}").repeat(50)).expect("root writes here");
        vault.put(&path);
    }
    let items = vault.items();
    assert_eq!(items.len(), FILES);
    Filled { _folder: folder, files, vault, items }
}

/// Numbers from 0 to below `end`, in no order.
fn places(end: usize, how_many: usize) -> impl Iterator<Item = usize> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    (0..how_many).map(move |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        usize::try_from(x % u64::try_from(end).expect("it is small")).expect("it is smaller")
    })
}

#[test]
fn a_damaged_index_loses_nothing_and_is_reported() {
    let Filled { vault, items, .. } = &filled();
    let index = vault.state.join("vault/index");
    let good = fs::read(&index).unwrap();
    let used = good.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let mut reported = 0;
    for (n, at) in places(used, 200).enumerate() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (n % 8);
        fs::write(&index, &bad).unwrap();
        let warned = vault.run(&["list"]).expect(0).err().contains("recover");
        let settled = vault.recover();
        assert_eq!(&vault.items(), items, "flip at {at}: {settled}");
        if n % 8 == 0 {
            assert_eq!(vault.recover(), "finished 0, undone 0, damaged 0", "flip at {at}");
        }
        assert_ne!(settled, "finished 0, undone 0, damaged 0", "flip at {at} is reported");
        reported += usize::from(warned);
    }
    assert_eq!(reported, 200, "also by a list");
    let cuts = if is_long() { used } else { 40 };
    for cut in (0..=used).step_by(used.div_ceil(cuts)).chain([used - 1, used, used + 1]) {
        fs::write(&index, &good[..cut]).unwrap();
        let settled = vault.recover();
        assert_eq!(&vault.items(), items, "cut at {cut}: {settled}");
    }
    fs::remove_file(&index).unwrap();
    let output = vault.run(&["recover"]).expect(0);
    assert!(output.err().contains("item-found"), "{}", output.both());
    assert_eq!(&vault.items(), items, "no index at all");
    for item in items {
        vault.run(&["restore", &item.id]).expect(0);
    }
}

#[test]
fn a_damaged_item_is_refused_and_the_others_are_not_touched() {
    let Filled { vault, items, files, .. } = &filled();
    let (hurt, others) = items.split_first().unwrap();
    let path = vault.state.join("vault/items").join(&hurt.id);
    let good = fs::read(&path).unwrap();
    let flips = places(good.len(), 200).enumerate().map(|(n, at)| {
        let mut bad = good.clone();
        bad[at] ^= 1 << (n % 8);
        (format!("flip at {at}"), bad)
    });
    let cuts =
        (0..good.len()).step_by(good.len() / 60).map(|cut| (format!("cut at {cut}"), good[..cut].to_vec()));
    let longer = [("longer".to_owned(), [&good[..], b"\0"].concat())];
    for (case, bad) in flips.chain(cuts).chain(longer) {
        fs::write(&path, bad).unwrap();
        let output = vault.run(&["restore", &hurt.id]).expect(3);
        let err = output.err();
        assert!(
            err.contains("damaged") || err.contains("not made by this vault"),
            "{case}: {}",
            output.both()
        );
        assert_eq!(names(files), [] as [&str; 0], "{case}: nothing appears");
        assert_eq!(&vault.items(), items, "{case}");
    }
    for item in others {
        vault.run(&["restore", &item.id]).expect(0);
    }
    fs::write(&path, &good).unwrap();
    vault.run(&["restore", &hurt.id]).expect(0);
    assert_eq!(names(files).len(), FILES);
}

#[test]
fn a_foreign_or_exchanged_item_is_refused() {
    let (mine, theirs) = (filled(), filled());
    let place = |filled: &Filled, n: usize| filled.vault.state.join("vault/items").join(&filled.items[n].id);
    // Another vault's item under its own name, under one of ours, and one of ours under another's name.
    fs::copy(place(&theirs, 0), mine.vault.state.join("vault/items").join(&theirs.items[0].id)).unwrap();
    fs::copy(place(&theirs, 1), place(&mine, 1)).unwrap();
    fs::copy(place(&mine, 3), place(&mine, 2)).unwrap();
    let output = mine.vault.run(&["recover"]).expect(0);
    assert!(output.err().contains("not made by this vault"), "{}", output.both());
    mine.vault.run(&["restore", &theirs.items[0].id]).expect(1);
    for n in [1, 2] {
        let output = mine.vault.run(&["restore", &mine.items[n].id]).expect(3);
        assert!(output.err().contains("not made by this vault"), "{}", output.both());
    }
    assert_eq!(names(&mine.files), [] as [&str; 0]);
    for n in [0, 3, 4] {
        mine.vault.run(&["restore", &mine.items[n].id]).expect(0);
    }
    theirs.vault.run(&["restore", &theirs.items[0].id]).expect(0);
}

#[test]
fn a_lost_item_is_reported_once() {
    let Filled { vault, items, .. } = &filled();
    fs::remove_file(vault.state.join("vault/items").join(&items[0].id)).unwrap();
    let output = vault.run(&["recover"]).expect(0);
    assert!(output.err().contains("item-lost") && output.out().contains("damaged 1"), "{}", output.both());
    assert_eq!(vault.items(), items[1..]);
    assert_eq!(vault.recover(), "finished 0, undone 0, damaged 0");
}

#[test]
fn a_vault_without_its_key_makes_no_other() {
    let Filled { vault, items, .. } = &filled();
    let key = vault.state.join("vault/key");
    let good = fs::read(&key).unwrap();
    let refused = |word: &str| {
        let output = vault.run(&["restore", &items[0].id]).expect(1);
        assert!(output.err().contains(word), "{}", output.both());
        assert_eq!(vault.items().len(), FILES);
    };
    fs::remove_file(&key).unwrap();
    refused("missing");
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        fs::write(&key, bad).unwrap();
        refused("damaged");
    }
    fs::write(&key, good).unwrap();
    vault.run(&["restore", &items[0].id]).expect(0);
}
