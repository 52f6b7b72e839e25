//! Where agents reach managers, as they and enrollment tokens are told it: this manager's addresses first, then
//! those of the others of its fleet, so that an agent whose manager dies knows where to go.

use std::sync::{Arc, PoisonError, RwLock};

use tm_protocol::address::Address;

/// Most addresses that are told.
const MOST: usize = 16;

/// The addresses as they are now. Copies share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Addresses(Arc<RwLock<Vec<Address>>>);

impl Addresses {
    /// Those of a manager that knows of no other.
    pub(crate) fn new(own: Vec<Address>) -> Self {
        Self(Arc::new(RwLock::new(own)))
    }

    /// What is told now.
    pub(crate) fn get(&self) -> Vec<Address> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells `own` and then `others`, each once, at most sixteen.
    pub(crate) fn set(&self, own: &[Address], others: impl IntoIterator<Item = Address>) {
        let mut all = own.to_vec();
        for other in others {
            if !all.contains(&other) {
                all.push(other);
            }
        }
        all.truncate(MOST);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = all;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ones_own_come_first_and_none_twice() {
        let address = |n: usize| Address::new(&format!("m{n}"), 1).unwrap();
        let addresses = Addresses::new(vec![address(1)]);
        addresses.set(&[address(1)], [address(2), address(1), address(2)]);
        assert_eq!(addresses.clone().get(), [address(1), address(2)]);
        addresses.set(&[address(1)], (0..99).map(address));
        assert_eq!((addresses.get().len(), addresses.get()[1].host()), (MOST, "m0"));
    }
}
