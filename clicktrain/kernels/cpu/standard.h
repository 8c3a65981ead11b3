// Everything that does not depend on the instruction set, to be included before one is selected.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <vector>

#include "abi.h"
#include "scratch.h"
#include "shares.h"
