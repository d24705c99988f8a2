/* Stands in for python.exe where START_CONTINUOUS.bat is tried under Wine (tests/test_start_bat.py).

   Each call is a line in the file CALLS: who was called, where, and every argument in brackets. Too old are those
   that the environment's TOO_OLD names. The installation makes .venv\Scripts\python.exe unless it ends with
   INSTALL_CODE; all else ends with TRAIN_CODE. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

static int code_of(const char *name) {
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

int main(int count, char **words) {
    char own[MAX_PATH], folder[MAX_PATH];
    GetModuleFileNameA(NULL, own, sizeof own);
    GetCurrentDirectoryA(sizeof folder, folder);
    const char *who = strstr(own, ".venv\\Scripts") ? "venv" : strstr(own, "python.exe") ? "python" : "launcher";
    const char *too_old = getenv("TOO_OLD"), *utf8 = getenv("PYTHONUTF8");
    int is_probe = 0, is_install = 0;

    FILE *calls = fopen(getenv("CALLS"), "a");
    if (!calls)
        return 99;
    fprintf(calls, "%s in [%s] utf8=%s", who, folder, utf8 ? utf8 : "not set");
    for (int number = 1; number < count; number++) {
        fprintf(calls, " [%s]", words[number]);
        is_probe |= strcmp(words[number], "-c") == 0;
        is_install |= strcmp(words[number], "runtime.install") == 0;
    }
    fprintf(calls, "\n");
    fclose(calls);

    if (is_probe)
        return too_old && strstr(too_old, who) != NULL;
    if (!is_install)
        return code_of("TRAIN_CODE");
    if (code_of("INSTALL_CODE") == 0 && strcmp(who, "venv") != 0) {
        CreateDirectoryA(".venv", NULL);
        CreateDirectoryA(".venv\\Scripts", NULL);
        CopyFileA(own, ".venv\\Scripts\\python.exe", FALSE);
    }
    return code_of("INSTALL_CODE");
}
