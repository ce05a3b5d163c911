# Warnings for our own sources; errors only where CI asks for them, so that a newer compiler can't break a user's build.
option(QUICKSILVER_WERROR "Treat warnings as errors" OFF)

add_library(quicksilver_warnings INTERFACE)
target_compile_options(quicksilver_warnings INTERFACE -Wall -Wextra -Wshadow -Wno-missing-field-initializers $<$<BOOL:${QUICKSILVER_WERROR}>:-Werror>)
